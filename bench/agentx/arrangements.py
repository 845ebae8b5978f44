"""What the harness asks: the same workers at the same pace, under our router, or each alone behind a stock rule."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from bench.agentx.balancer import balanced
from bench.agentx.routing import PIECE, Alone, CacheAware, Routing, Sticky
from bench.common.fake_machine import Machine, running
from router.dispatch.config import DispatchConfig

OURS, DEFAULT = "ours", "default"
NAMES = (OURS, DEFAULT, "sticky", "cache-aware")
TOKEN_BYTES = 3
"""Of a prompt, about."""
SLOT_TOKEN_BYTES = 512
"""What a token takes in a store of the fake engine."""


@asynccontextmanager
async def serving(name: str, folder: Path, machine: Machine) -> AsyncGenerator[str]:
    """The address of the arrangement of that name. ``machine``: its workers and its stores' memory, in all.

    Where each worker is for itself it has a store that is its share of that memory, and a router that only it joins:
    what differs is who may read what, and who chooses.

    Raises:
        RuntimeError: it does not come up.
    """
    parts = parts_of(name, machine)
    async with AsyncExitStack() as stack:
        urls: list[str] = []
        for at, part in enumerate(parts):
            own = folder / f"part{at}"
            own.mkdir()
            urls.append(await stack.enter_async_context(running(own, part)))
        yield await stack.enter_async_context(balanced(urls, routing_of(name, parts)))


def parts_of(name: str, machine: Machine) -> list[Machine]:
    """The clusters that are started: ours is one, whose steps wait in the router until a worker has room, or as it is
    by default at workers."""
    if name in (OURS, DEFAULT):
        return [msgspec.structs.replace(machine, dispatch=DispatchConfig(turns=name == OURS))]
    own = {"decode": 1, "stores": 1, "store_bytes": machine.stores * machine.store_bytes // machine.decode}
    return [msgspec.structs.replace(machine, **own)] * machine.decode


def routing_of(name: str, parts: Sequence[Machine]) -> Routing:
    """The rule before them. Who goes by caches remembers as much as a worker's memory and store hold."""
    match name:
        case "sticky":
            return Sticky(len(parts))
        case "cache-aware":
            held = parts[0].kv_tokens + parts[0].store_bytes // SLOT_TOKEN_BYTES
            return CacheAware(len(parts), TOKEN_BYTES * held // PIECE)
        case _:
            return Alone()
