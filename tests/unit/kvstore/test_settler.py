import asyncio

import uvloop

from kvstore.config import StoreConfig
from kvstore.index.arena import Arena
from kvstore.node.events import Feed
from kvstore.node.settler import Settler
from kvstore.node.waiting import Waiters
from tracehaul.runtime import clock
from tracehaul.wire.blocks import BlockSpec
from tracehaul.wire.ids import BlockHash, Generation

SLOT = 4096


def test_what_has_had_its_time_while_the_loop_was_busy_is_ended_once_it_is_free() -> None:
    """A timer of uvloop's for a time that has come is none that knows its time."""

    async def main() -> None:
        config = StoreConfig(arena_bytes=4 * SLOT, slot_bytes=SLOT, reservation_ttl_s=0.01)
        arena = Arena(config)
        settler = Settler(arena, Feed(Generation(1), changes_max=10, subscribers_max=1), Waiters(10))
        arena.reserve([BlockSpec(BlockHash(b"a" * 16), BlockHash(b"r" * 16), 100)], "writer", clock.now_s() - 1.0)
        settler.settle()
        settler.settle()
        assert arena.reservations == 1
        await asyncio.sleep(0.01)
        assert arena.reservations == 0
        settler.close()

    uvloop.run(main())
