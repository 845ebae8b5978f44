"""Pages that go to a store of the same host as they are: a real node in a process of its own, no copy in between."""

# pyright: reportPrivateUsage=false

import contextlib
import importlib
import threading
import time  # noqa: TID251 - threads wait here, and no loop
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import pytest
import torch

from engines.blocks import EngineStore, HostPage
from engines.blocks.direct import Beside
from kvstore.client import StagingBuffer
from tests import engine_stubs as stubs
from tests.engine_rig import SLOT_BYTES, Fleet, fleet
from tests.engine_vllm import LAYERS, Engine, request
from tracehaul.transfer.pieces import Pieces
from tracehaul.wire.hashing import KVLayout, chain, pack_tokens
from tracehaul.wire.ids import BlockHash

LAYOUT = KVLayout("m@r1", "bfloat16", 4, 2, 16, 2, 4, shard="0/1", order="test/direct")
SIZES = (1024, 3072, 500)
NBYTES = sum(SIZES)


@pytest.fixture(scope="module")
def rig() -> Iterator[Fleet]:
    with fleet() as made:
        yield made


@pytest.fixture
def store(rig: Fleet) -> Iterator[EngineStore]:
    if rig.process is None:
        rig.start_store()
    with opened(rig) as made:
        yield made


@contextlib.contextmanager
def opened(rig: Fleet, **changes: Any) -> Generator[EngineStore]:
    made = EngineStore(rig.config(pool="direct", **changes), LAYOUT, NBYTES)
    try:
        yield made
    finally:
        made.close()


class Blocks:
    """Blocks of a prompt of its own; between the pieces of a page lies what is not its."""

    def __init__(self, root: BlockHash, name: int, count: int = 4) -> None:
        self.hashes = chain(root, pack_tokens([name * 1000 + at for at in range(count * 4)]), 4)
        self.parents = [root, *self.hashes[:-1]]
        self.memory = [bytearray((name + place + at) % 251 for at in range(3 * 4096)) for place in range(count)]
        self.pages = [page(memory) for memory in self.memory]

    def empty(self) -> tuple[list[bytearray], list[HostPage]]:
        memory = [bytearray(3 * 4096) for _ in self.hashes]
        return memory, [page(one) for one in memory]

    def held(self, memory: bytearray, place: int) -> bool:
        return content(memory) == content(self.memory[place])


def page(memory: bytearray) -> HostPage:
    whole = memoryview(memory)
    return HostPage.of([whole[4096 * at : 4096 * at + size] for at, size in enumerate(SIZES)])


def content(memory: bytearray) -> bytes:
    return b"".join(memory[4096 * at : 4096 * at + size] for at, size in enumerate(SIZES))


def until(true: Callable[[], bool], within_s: float = 10.0) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def staged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where a page was copied to or from staging memory."""
    seen: list[str] = []
    save, load = HostPage.save, HostPage.load

    def saved(self: HostPage, into: memoryview) -> None:
        seen.append("save")
        save(self, into)

    def loaded(self: HostPage, source: memoryview) -> None:
        seen.append("load")
        load(self, source)

    monkeypatch.setattr(HostPage, "save", saved)
    monkeypatch.setattr(HostPage, "load", loaded)
    return seen


def test_pages_go_there_and_back_with_no_copy_in_between(store: EngineStore, staged: list[str]):
    blocks = Blocks(store.root, 1)
    assert store.put(blocks.hashes, blocks.parents, blocks.pages) == [True] * 4
    memory, pages = blocks.empty()
    assert store.get(blocks.hashes, pages) == [True] * 4
    assert all(blocks.held(one, place) for place, one in enumerate(memory))
    assert all(not any(one[1024:4096]) and not any(one[4096 + 3072 : 8192]) for one in memory), "the engine's own"
    assert staged == []
    absent = Blocks(store.root, 2)
    memory, pages = absent.empty()
    assert store.get([*blocks.hashes[:1], *absent.hashes[1:]], pages) == [True, False, False, False]
    assert not any(map(any, memory[1:]))
    assert not store._joined.lending._lent, "all was given back"  # pyright: ignore[reportOptionalMemberAccess]


def test_pages_of_other_sizes_go_by_staging_memory(store: EngineStore, staged: list[str]):
    blocks = Blocks(store.root, 3, 1)
    odd = HostPage.of([memoryview(blocks.memory[0])[:1000], memoryview(blocks.memory[0])[4096 : 4096 + NBYTES - 1000]])
    assert store.put(blocks.hashes, blocks.parents, [odd]) == [True]
    assert staged == ["save"]
    assert store.put_beside(blocks.hashes, blocks.parents, [odd]) is None


def test_a_put_beside_is_of_what_was_there(store: EngineStore, staged: list[str]):
    blocks = Blocks(store.root, 4)
    before = Blocks(store.root, 4)
    beside = store.put_beside(blocks.hashes, blocks.parents, blocks.pages)
    assert beside is not None
    assert beside.count == 4
    until(lambda: beside.done)
    for memory in blocks.memory:
        memory[:] = bytes(len(memory))
    memory, pages = blocks.empty()
    assert store.get(blocks.hashes, pages) == [True] * 4
    assert all(before.held(one, place) for place, one in enumerate(memory))
    assert staged == []


def test_a_page_that_changes_under_a_put_is_published_by_nobody(store: EngineStore, monkeypatch: pytest.MonkeyPatch):
    """It changes while it is read: what was read has a right sum, and is wrong."""
    blocks = Blocks(store.root, 5)
    reading, changed = threading.Event(), threading.Event()
    turns = Pieces.turns

    def slow(self: Pieces, work: Iterator[None]) -> Iterator[None]:
        reading.set()
        assert changed.wait(5)
        yield from turns(self, work)

    monkeypatch.setattr(Pieces, "turns", slow)
    beside = store.put_beside(blocks.hashes, blocks.parents, blocks.pages)
    assert beside is not None
    assert reading.wait(5)
    beside.spoil(1)
    blocks.memory[1][:] = bytes(len(blocks.memory[1]))
    changed.set()
    until(lambda: beside.done)
    monkeypatch.undo()
    assert store.get(blocks.hashes, blocks.empty()[1]) == [True, False, True, True]
    assert store.put(blocks.hashes, blocks.parents, blocks.pages) == [True] * 4, "it is reserved by nobody"


def test_more_than_may_be_on_its_way_is_dropped(rig: Fleet):
    with opened(rig, name="narrow", staging_bytes=6 * SLOT_BYTES) as store:
        blocks = Blocks(store.root, 6, 10)
        rig.freeze()
        try:
            began = time.monotonic()
            first = store.put_beside(blocks.hashes, blocks.parents, blocks.pages)
            second = store.put_beside(blocks.hashes, blocks.parents, blocks.pages)
            assert time.monotonic() - began < 0.2, "nobody waits"
            assert first is not None
            assert second is not None
            room = 3 * SLOT_BYTES // NBYTES
            assert (first.count, second.count) == (room, 0)
            assert second.done
            assert store.stats.dropped == 20 - room
        finally:
            rig.thaw()
        until(lambda: first.done, 5.0)
        until(lambda: store.put(blocks.hashes, blocks.parents, blocks.pages) == [True] * 10)


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_store_that_is_gone_or_stands_still_parks_nobody(rig: Fleet, store: EngineStore, how: str):
    blocks = Blocks(store.root, 7)
    store.put(blocks.hashes, blocks.parents, blocks.pages)
    rig.kill() if how == "killed" else rig.freeze()
    try:
        memory, pages = blocks.empty()
        began = time.monotonic()
        assert store.get(blocks.hashes, pages) == [False] * 4
        other = Blocks(store.root, 8)
        assert store.put(other.hashes, other.parents, other.pages) == [False] * 4
        assert time.monotonic() - began < 2 * 2.0 + 1.0, "each call has two seconds"
        assert not any(map(any, memory))
    finally:
        if how == "frozen":
            rig.thaw()
            until(lambda: store.get(blocks.hashes, blocks.empty()[1]) == [True] * 4)


def test_a_page_that_was_given_up_is_left_alone(store: EngineStore, monkeypatch: pytest.MonkeyPatch):
    """The loop's thread stands still in the middle of a get: the engine goes on, and what comes then lands nowhere."""
    blocks = Blocks(store.root, 9)
    store.put(blocks.hashes, blocks.parents, blocks.pages)
    get, over = store._joined.client.get, threading.Event()

    async def late(hashes: Sequence[BlockHash], buffers: Sequence[StagingBuffer], timeout_s: float) -> Any:
        time.sleep(3.0)  # noqa: ASYNC251 - the whole loop stands still
        try:
            return await get(hashes, buffers, timeout_s)
        finally:
            over.set()

    monkeypatch.setattr(store._joined.client, "get", late)
    memory, pages = blocks.empty()
    began = time.monotonic()
    assert store.get(blocks.hashes, pages) == [False] * 4
    assert time.monotonic() - began < 2.9
    assert over.wait(5)
    assert not any(map(any, memory))
    monkeypatch.undo()
    until(lambda: store.get(blocks.hashes, pages) == [True] * 4)


def test_what_gives_way_while_it_is_read_is_a_miss_or_whole(store: EngineStore):
    """The arena has 64 slots: these push each other out."""
    groups = [Blocks(store.root, name, 8) for name in range(12, 28)]

    def put() -> None:
        for group in groups:
            store.put(group.hashes, group.parents, group.pages)

    putting = threading.Thread(target=put)
    putting.start()
    seen: set[bool] = set()
    while putting.is_alive() or not seen:
        for group in groups:
            memory, pages = group.empty()
            goods = store.get(group.hashes, pages)
            assert all(group.held(one, place) for place, one in enumerate(memory) if goods[place])
            seen.update(goods)
    assert seen == {True, False}


def test_vllm_reads_blocks_where_they_are_and_publishes_none_that_has_changed(
    rig: Fleet, monkeypatch: pytest.MonkeyPatch, staged: list[str]
):
    stubs.install_vllm(monkeypatch)
    engine = Engine(importlib.import_module("engines.vllm.plugin"), rig.extra(name="vl", pool="vl"), 64, device="cpu")
    staged.clear()  # the cache was looked at
    besides: list[Beside] = []
    put_beside = engine.worker._store.put_beside

    def kept(*arguments: Any) -> Beside | None:
        beside = put_beside(*arguments)
        assert beside is not None
        besides.append(beside)
        return beside

    monkeypatch.setattr(engine.worker._store, "put_beside", kept)
    first, released = request("a", list(range(100, 113))), threading.Event()
    turns = Pieces.turns

    def slow(self: Pieces, work: Iterator[None]) -> Iterator[None]:
        assert released.wait(5)
        yield from turns(self, work)

    monkeypatch.setattr(Pieces, "turns", slow)
    engine.matched(first)
    engine.allocate(first, [3, 1, 7, 9], 0)
    engine.fill(3, 1, 7)
    began = time.monotonic()
    engine.step({"a": (0, 13)}, {})
    assert time.monotonic() - began < 0.5, "no step waits for a put"
    engine.scheduler.request_finished(first, [3, 1, 7, 9])
    kept_back = {name: cache.clone() for name, cache in engine.caches.items()}
    # The engine gives two of its places to another, and what it had of a third itself is that one's, too.
    other = request("b", [*range(100, 104), *range(200, 207)])
    engine.matched(other, 4)
    engine.allocate(other, [3, 7, 1], 0)
    engine.worker._store.put_beside = lambda *arguments: Beside([])
    engine.step({"b": (4, 7)}, {})
    engine.fill(7, 1)
    released.set()
    until(lambda: all(beside.done for beside in besides))
    keys = engine.scheduler._scheduling._chain(first)
    keys.upto(3)
    assert [engine.scheduler._store.exists([key]) for key in keys.keys] == [1, 0, 0]
    again = request("c", list(range(100, 105)))
    assert engine.matched(again) == (4, False)
    engine.allocate(again, [12, 13], 4)
    engine.step({"c": (4, 1)}, {})
    assert engine.failed() == set()
    assert all(torch.equal(kept_back[name][3], engine.caches[name][12]) for name in LAYERS)
    assert staged == []
    engine.close()
