"""The store as engines call it: a real node in a process of its own, and whatever may become of it."""

# pyright: reportPrivateUsage=false

import asyncio
import contextlib
import threading
import time  # noqa: TID251 - threads wait here, and no loop
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engines.blocks import EngineConfig, EngineRefused, EngineStore, HostPage
from engines.blocks.config import config_of
from kvstore.client import StagingBuffer
from router.fleet.pools import pools_of
from tests.engine_rig import SLOT_BYTES, Fleet, fleet
from tracehaul.transfer.base import Copy, Region, TransferTimedOut
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.hashing import KVLayout, chain, pack_tokens
from tracehaul.wire.ids import BlockHash, Checksum

LAYOUT = KVLayout("m@r1", "bfloat16", 4, 2, 16, 2, 4, shard="0/1", order="test/1", hashing="test/1")
NBYTES = 3000


@pytest.fixture(scope="module")
def rig() -> Iterator[Fleet]:
    with fleet() as made:
        yield made


@pytest.fixture
def store(rig: Fleet) -> Iterator[EngineStore]:
    if rig.process is None:
        rig.start_store()
    with opened(rig.config()) as made:
        yield made


@contextlib.contextmanager
def opened(config: EngineConfig, layout: KVLayout = LAYOUT) -> Generator[EngineStore]:
    made = EngineStore(config, layout, NBYTES)
    try:
        yield made
    finally:
        made.close()


class Blocks:
    """Blocks of a prompt of its own, in memory that only a test has: pages of two pieces, apart from each other."""

    def __init__(self, root: BlockHash, name: int, count: int = 4) -> None:
        self.hashes = chain(root, pack_tokens([name * 1000 + at for at in range(count * 4)]), 4)
        self.parents = [root, *self.hashes[:-1]]
        self.memory = [bytearray((name + place + at) % 256 for at in range(2 * NBYTES)) for place in range(count)]
        self.pages = [page(memory) for memory in self.memory]

    def empty(self) -> tuple[list[bytearray], list[HostPage]]:
        memory = [bytearray(2 * NBYTES) for _ in self.hashes]
        return memory, [page(one) for one in memory]

    def held(self, memory: bytearray, place: int) -> bool:
        ours, theirs = bytearray(NBYTES), bytearray(NBYTES)
        page(self.memory[place]).save(memoryview(ours))
        page(memory).save(memoryview(theirs))
        return ours == theirs


def page(memory: bytearray) -> HostPage:
    whole = memoryview(memory)
    return HostPage.of([whole[:1000], whole[3000:5000]])


def until(true: Callable[[], bool], within_s: float = 10.0) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def test_blocks_of_several_pieces_go_there_and_back(store: EngineStore):
    blocks = Blocks(store.root, 1)
    assert store.exists(blocks.hashes) == 0
    assert store.put(blocks.hashes, blocks.parents, blocks.pages) == [True] * 4
    assert store.exists(blocks.hashes) == 4
    memory, pages = blocks.empty()
    assert store.get(blocks.hashes, pages) == [True] * 4
    assert all(blocks.held(one, place) for place, one in enumerate(memory))
    assert all(not any(one[1000:3000]) for one in memory), "what lies between the pieces is the engine's"


def test_an_engine_is_an_observer_that_is_given_nothing(rig: Fleet, store: EngineStore):
    infos = {str(node): info for node, info in rig.members().items()}
    assert infos["engine"].role == "observer"
    assert not pools_of(rig.members().values())


def test_a_part_that_is_there_is_a_part(store: EngineStore):
    blocks = Blocks(store.root, 2)
    store.put(blocks.hashes[:2], blocks.parents[:2], blocks.pages[:2])
    assert store.exists(blocks.hashes) == 2
    memory, pages = blocks.empty()
    assert store.get(blocks.hashes, pages) == [True, True, False, False]
    assert not any(memory[2])


def test_more_than_staging_has_room_for_goes_in_parts(rig: Fleet):
    with opened(rig.config(staging_bytes=8 * SLOT_BYTES)) as store:
        blocks = Blocks(store.root, 3, 20)
        assert store.put(blocks.hashes, blocks.parents, blocks.pages) == [True] * 20
        memory, pages = blocks.empty()
        assert store.get(blocks.hashes, pages) == [True] * 20
        assert all(blocks.held(one, place) for place, one in enumerate(memory))


def test_a_put_that_nobody_waits_for_takes_what_there_is_room_for(rig: Fleet):
    with opened(rig.config(staging_bytes=4 * 4096)) as store:
        blocks = Blocks(store.root, 4, 5)
        rig.freeze()  # what is taken makes no room meanwhile
        taken = store.put_later(blocks.hashes, blocks.parents, blocks.pages)
        rig.thaw()
        for memory in blocks.memory:
            memory[:] = bytes(len(memory))  # the engine goes on at once
        assert taken == 2
        assert store.stats.dropped == 3
        until(lambda: store.exists(blocks.hashes) == 2)
        until(lambda: store.puts_free == 2)
        before = Blocks(store.root, 4, 5)
        memory, pages = blocks.empty()
        assert store.get(blocks.hashes, pages) == [True, True, False, False, False]
        assert before.held(memory[0], 0)


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_store_that_is_gone_or_stands_still_parks_nobody(rig: Fleet, store: EngineStore, how: str):
    blocks = Blocks(store.root, 5)
    store.put(blocks.hashes, blocks.parents, blocks.pages)
    rig.kill() if how == "killed" else rig.freeze()
    try:
        memory, pages = blocks.empty()
        began = time.monotonic()
        assert store.get(blocks.hashes, pages) == [False] * 4
        assert store.exists(blocks.hashes) == 0
        other = Blocks(store.root, 6)
        assert store.put(other.hashes, other.parents, other.pages) == [False] * 4
        took_s = time.monotonic() - began
        assert took_s < 3 * 2.0 + 1.0, "each call has two seconds"
        began = time.monotonic()
        assert store.put_later(other.hashes, other.parents, other.pages) in range(5)
        assert time.monotonic() - began < 0.2
        assert not any(map(any, memory))
    finally:
        if how == "frozen":
            rig.thaw()
            until(lambda: store.get(blocks.hashes, blocks.empty()[1]) == [True] * 4)


def test_a_store_that_comes_back_is_used_again(rig: Fleet, store: EngineStore):
    blocks = Blocks(store.root, 7)
    store.put(blocks.hashes, blocks.parents, blocks.pages)
    rig.start_store()
    assert store.get(blocks.hashes, blocks.empty()[1]) == [False] * 4
    until(lambda: store.put(blocks.hashes, blocks.parents, blocks.pages) == [True] * 4)
    assert store.get(blocks.hashes, blocks.empty()[1]) == [True] * 4


def test_a_server_starts_without_a_store_and_uses_the_one_that_comes(rig: Fleet):
    rig.stop_store()
    with opened(rig.config(attach_s=0.5)) as store:
        blocks = Blocks(store.root, 8)
        assert not store.put(blocks.hashes, blocks.parents, blocks.pages)[0]
        assert store.exists(blocks.hashes) == 0
        rig.start_store()
        until(lambda: store.ready)
        until(lambda: store.put(blocks.hashes, blocks.parents, blocks.pages) == [True] * 4)


def test_routers_are_those_that_the_file_names_now(rig: Fleet, tmp_path: Path):
    file = tmp_path / "routers.json"
    config = rig.config(name="followed", routers=(), routers_file=str(file), attach_s=0.2)
    with opened(config) as store:
        assert not store.ready, "nobody has said where routers are"
        file.write_bytes(b'["127.0.0.1:')
        time.sleep(1.2)
        assert not store.ready, "what is torn names nobody"
        file.write_bytes(msgspec.json.encode([rig.router]))
        until(lambda: store.ready)
        blocks = Blocks(store.root, 40)
        assert store.put(blocks.hashes, blocks.parents, blocks.pages) == [True] * 4
        file.write_bytes(b"[]")
        time.sleep(1.2)
        assert store.get(blocks.hashes, blocks.empty()[1]) == [True] * 4, "who names nobody takes none away"


def test_what_lands_late_lands_in_no_page(store: EngineStore, monkeypatch: pytest.MonkeyPatch):
    blocks = Blocks(store.root, 9)
    store.put(blocks.hashes, blocks.parents, blocks.pages)
    late: list[Callable[[], None]] = []

    async def read(
        self: ShmTransfer, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> Sequence[Checksum] | None:
        """Misses its deadline; its bytes come when a test says."""
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def land() -> None:
            for copy in copies:
                local.buffer[copy.local_offset : copy.local_offset + copy.nbytes] = b"\xee" * copy.nbytes
            settled.set_result(None)

        late.append(land)
        raise TransferTimedOut("late", settled)

    staging = store._joined.client.staging
    free = staging.free
    with monkeypatch.context() as patch:
        patch.setattr(ShmTransfer, "read", read)
        memory, pages = blocks.empty()
        assert store.get(blocks.hashes, pages) == [False] * 4
    until(lambda: staging.free == free - 4)  # what a late transfer may touch is nobody's
    assert staging.quarantined == 4
    other = [bytearray(one) for one in memory]  # the engine has long put something else there
    store._loop.call_soon_threadsafe(late[0])
    until(lambda: staging.free == free)
    assert staging.quarantined == 0
    assert memory == other
    until(lambda: store.get(blocks.hashes, pages) == [True] * 4)
    assert blocks.held(memory[0], 0)


def test_what_a_late_write_reads_from_is_not_used_again_before(store: EngineStore, monkeypatch: pytest.MonkeyPatch):
    settled: list[asyncio.Future[None]] = []

    async def write(
        self: ShmTransfer, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> Sequence[Checksum] | None:
        settled.append(asyncio.get_running_loop().create_future())
        raise TransferTimedOut("late", settled[-1])

    free = store.puts_free
    blocks = Blocks(store.root, 10)
    with monkeypatch.context() as patch:
        patch.setattr(ShmTransfer, "write", write)
        assert store.put(blocks.hashes, blocks.parents, blocks.pages) == [False] * 4
    until(lambda: store.puts_free == free - 4)
    store._loop.call_soon_threadsafe(lambda: [one.set_result(None) for one in settled])
    until(lambda: store.puts_free == free)


def test_a_page_that_was_given_up_is_left_alone(store: EngineStore, monkeypatch: pytest.MonkeyPatch):
    """The loop's thread is late with an answer: what it brings is dropped, and its buffers are free again."""
    blocks = Blocks(store.root, 11)
    store.put(blocks.hashes, blocks.parents, blocks.pages)
    staging, get = store._joined.client.staging, store._joined.client.get
    free = staging.free

    async def slow(hashes: Sequence[BlockHash], buffers: Sequence[StagingBuffer], timeout_s: float) -> Any:
        sizes = await get(hashes, buffers, timeout_s)
        time.sleep(3.0)  # noqa: ASYNC251 - the whole loop stands still
        return sizes

    monkeypatch.setattr(store._joined.client, "get", slow)
    memory, pages = blocks.empty()
    began = time.monotonic()
    assert store.get(blocks.hashes, pages) == [False] * 4
    assert time.monotonic() - began < 2.9
    until(lambda: staging.free == free)
    assert not any(map(any, memory))


def test_what_gives_way_while_it_is_read_is_a_miss_or_whole(rig: Fleet, store: EngineStore):
    """The arena has 64 slots: these push each other out."""
    groups = [Blocks(store.root, name, 8) for name in range(12, 28)]

    def put() -> None:
        for group in groups:
            store.put(group.hashes, group.parents, group.pages)

    seen: set[bool] = set()

    def look() -> None:
        for group in groups:
            memory, pages = group.empty()
            goods = store.get(group.hashes, pages)
            assert all(group.held(one, place) for place, one in enumerate(memory) if goods[place])
            assert all(not any(one) for place, one in enumerate(memory) if not goods[place])
            seen.update(goods)

    putting = threading.Thread(target=put)
    putting.start()
    while putting.is_alive():
        look()
    look()
    assert seen == {True, False}


# --- identity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": "m@r2"}, "model 'm@r1' and not 'm@r2'"),
        ({"shard": "1/2"}, "shard '1' and not '2'"),
        ({"order": "test/2"}, "order 'test/1' and not 'test/2'"),
        ({"hashing": ""}, "hashing 'test/1' and not ''"),
        ({"dtype": "float8_e4m3fn", "scales": "revision"}, "dtype 'bfloat16' and not 'float8_e4m3fn'"),
    ],
)
def test_a_pool_that_holds_something_else_refuses_a_start_in_one_line(
    rig: Fleet, store: EngineStore, changed: dict[str, str], told: str
):
    layout = msgspec.structs.replace(LAYOUT, **changed)
    until(lambda: store.ready)
    with pytest.raises(EngineRefused) as refused:
        EngineStore(rig.config(name="other"), layout, NBYTES)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    with opened(rig.config(name="another", pool=told), layout) as made:
        assert made.ready


def test_a_record_that_cannot_be_read_refuses_too(rig: Fleet, store: EngineStore, monkeypatch: pytest.MonkeyPatch):
    def nonsense(layout: KVLayout) -> bytes:
        return b"\x00{nonsense".ljust(4096)

    monkeypatch.setattr("engines.blocks.joined.record_of", nonsense)
    with opened(rig.config(name="liar", pool="corrupted")):
        monkeypatch.undo()
        with pytest.raises(EngineRefused, match="cannot be read"):
            EngineStore(rig.config(name="reader", pool="corrupted"), LAYOUT, NBYTES)


def test_two_roots_never_serve_each_other(rig: Fleet, store: EngineStore):
    layout = msgspec.structs.replace(LAYOUT, order="test/amx")
    with opened(rig.config(name="amx", pool="amx"), layout) as other:
        ours, theirs = Blocks(store.root, 30), Blocks(other.root, 30)
        assert all(store.put(ours.hashes, ours.parents, ours.pages))
        assert other.exists(theirs.hashes) == 0
        assert other.get(theirs.hashes, theirs.empty()[1]) == [False] * 4


def test_another_rank_of_the_same_cut_is_no_other_pool(rig: Fleet):
    first, second = (msgspec.structs.replace(LAYOUT, shard=f"{rank}/2") for rank in (0, 1))
    assert first.root() != second.root()
    with opened(rig.config(name="a", pool="tp2"), first), opened(rig.config(name="b", pool="tp2"), second) as made:
        assert made.ready


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (None, "no object"),
        ({"tracehaul": {"routers": ["r:1"], "name": "n"}}, "revision"),
        ({"tracehaul": {"name": "n", "revision": "r"}}, "routers"),
        ({"tracehaul": {"routers": ["r:1"], "name": "n", "revision": ""}}, "must not be empty"),
        ({"tracehaul": {"routers": ["r:1"], "name": "n", "revision": "r", "rooter": 1}}, "rooter"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(extra: dict[str, Any] | None, told: str):
    with pytest.raises(EngineRefused, match=told):
        config_of(extra)
