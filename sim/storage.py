"""What lies below a simulated store node's memory: a device that outlives the process, slow and with faults.

The node runs its real tier over it. A killed process leaves what it was writing half done; a loss of power also takes
back, in no order, what the device had not been told to flush. Content is kept as a real device keeps it: bytes and
records apart, so that every disagreement between them is possible that a crash can cause.
"""

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

import msgspec

from kvstore.copies.config import ReplicationConfig
from kvstore.tiers.fake import MemoryDevice, MemoryPinFile, PowerCut
from kvstore.tiers.fake_objects import MemoryObjects
from kvstore.tiers.records import RECORD_BYTES, Layout, Record, unpack_records
from kvstore.tiers.tiering import TieringConfig
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash

T = TypeVar("T")

PAGE_BYTES = 4096
SLOW_S = 1.0
"""What each call of a slow device takes more, at most."""


class Below(msgspec.Struct, frozen=True):
    """Sizes and times of the tier below memory, and what the world's keepers ask of the stores."""

    slots: int
    latency_s: float
    """Every call of the device takes up to this long."""
    tiering: TieringConfig
    pin_share: float
    """Of steps: their blocks are pinned afterwards."""
    prefetch_share: float
    """Of steps: their blocks are asked for before the next one."""
    quotas: bool
    """Whether a tenant has one."""
    hard_share: float = 0.25
    """Of the slots, that one tenant may pin hard."""
    objects_slots: int = 0
    """Blocks in a bucket below the device; 0: there is none."""
    replicas: int = 1
    """Copies that a pin asks for."""
    copies: ReplicationConfig = ReplicationConfig(copy_bytes_s=1 << 20, grace_s=2.0)


def make_below(seed: int, slots: int) -> Below | None:
    """By seed: no tier, one that always evicts, one like memory, or one that holds everything."""
    rng = random.Random(f"below {seed}")  # noqa: S311 - reproducible is the point
    if rng.random() < 0.3:
        return None
    return Below(
        slots=rng.choice([12, slots, 10 * slots]),
        latency_s=rng.choice([0.0005, 0.005, 0.05]),
        tiering=TieringConfig(
            promotions_max=rng.choice([4, 1024]),
            promote_timeout_s=rng.choice([0.02, 2.0]),
            scrub_bytes_s=rng.choice([0, 16 * PAGE_BYTES]),
        ),
        pin_share=rng.choice([0.0, 0.5, 1.0]),
        prefetch_share=rng.choice([0.0, 0.5]),
        quotas=rng.random() < 0.5,
        hard_share=rng.choice([0.25, 0.5]),
        replicas=rng.choice([1, 2]),
        objects_slots=rng.choice([0, 0, slots, 10 * slots]),
    )


class _Page(NamedTuple):
    """A write since the last flush: what was there before."""

    records: bool
    at: int
    before: bytes


class _Calls:
    """:class:`tracehaul.runtime.offload.Offload` of what a process asks of a device: each call takes its time."""

    def __init__(self, rng: random.Random, latency_s: float) -> None:
        self._rng = rng
        self._latency_s = latency_s
        self._under_way: dict[int, Callable[[], object]] = {}
        self._number = 0
        self.slow_s = 0.0
        """Added to every call, at most."""

    async def run(self, function: Callable[[], T]) -> T:
        self._number += 1
        call = self._number
        self._under_way[call] = function
        try:
            await asyncio.sleep(self._rng.uniform(0.0, self._latency_s) + self._rng.uniform(0.0, self.slow_s))
            return function()
        finally:
            self._under_way.pop(call, None)  # a killed process has none

    async def turns(self, *work: Iterator[object]) -> None:
        for iterator in work:
            for _ in iterator:
                await asyncio.sleep(0)

    def close(self) -> None:
        pass

    def abandoned(self) -> list[Callable[[], object]]:
        """Calls under way of a process that is gone; forgotten with that."""
        calls = list(self._under_way.values())
        self._under_way.clear()
        return calls


class SimPinFile(MemoryPinFile):
    """A :class:`kvstore.node.pin_journal.PinFile` of one node, through all its lives."""

    def __init__(self, rng: random.Random, latency_s: float) -> None:
        super().__init__()
        self._rng = rng
        self._flushed = 0
        self.calls = _Calls(rng, latency_s)

    def replace(self, data: bytes) -> None:
        super().replace(data)
        self._flushed = len(data)

    def flush(self) -> None:
        self._flushed = len(self.data)

    def killed(self) -> None:
        """The process that uses it is gone: each call under way got as far as it got."""
        for function in self.calls.abandoned():
            self.bytes_left = self._rng.randrange(300)
            with suppress(PowerCut, OSError):
                function()
        self.bytes_left = None

    def lose_power(self) -> None:
        """After :meth:`killed`: the end that was not flushed may not have happened."""
        self.data = self.data[: self._rng.randint(min(self._flushed, len(self.data)), len(self.data))]


class SimObjects(MemoryObjects):
    """A node's bucket, through all its lives and hosts. A call that its process did not live to see may be done."""

    def __init__(self, latency_s: float, seed: str) -> None:
        super().__init__()
        self._rng = random.Random(seed)  # noqa: S311 - reproducible is the point
        self._latency_s = latency_s
        self.published: set[BlockHash] = set()
        """Blocks that were ever published by a node that used this bucket."""

    async def put(self, name: str, view: memoryview) -> None:
        if not self.failing and self._rng.random() < 0.5:
            self.data[name] = bytearray(view)
        await super().put(name, view)

    def flip(self) -> None:
        """One byte of one object is another."""
        names = sorted(self.data)
        if names:
            body = self.data[names[self._rng.randrange(len(names))]]
            body[self._rng.randrange(len(body))] ^= 0x10

    async def _try(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.0, self._latency_s))
        await super()._try()


class SimDevice(MemoryDevice):
    """A :class:`kvstore.tiers.base.SlotDevice` of one node, through all its lives, and its pins beside it."""

    def __init__(self, slots_max: int, slot_bytes: int, latency_s: float, seed: str, objects: SimObjects) -> None:
        """``objects``: the bucket of the node that it is attached to."""
        super().__init__(slots_max, slot_bytes)
        self.objects = objects
        self._rng = random.Random(seed)  # noqa: S311 - reproducible is the point
        self._unflushed: list[_Page] = []
        self.calls = _Calls(self._rng, latency_s)
        self.pins = SimPinFile(self._rng, latency_s)
        self.writes_fail = False
        self.flipped = 0
        """Bytes that a fault changed, in records or blocks."""
        self.lost_power = 0
        self.on_read: Callable[[memoryview], None] | None = None
        """Told of every view that is about to be read into."""

    # --- as the tier sees it ------------------------------------------------------------------------------

    def read(self, slots: Sequence[int], views: Sequence[memoryview]) -> None:
        if self.on_read is not None:
            for view in views:
                self.on_read(view)
        super().read(slots, views)

    def write(self, slots: Sequence[int], views: Sequence[memoryview]) -> None:
        self._take()
        for slot, view in zip(slots, views, strict=True):
            at = slot * self.slot_bytes
            for start in range(at, at + view.nbytes, PAGE_BYTES):
                self._unflushed.append(_Page(False, start, bytes(self.data[start : start + PAGE_BYTES])))
        super().write(slots, views)

    def write_records(self, records: Mapping[int, bytes]) -> None:
        self._take()
        for slot in records:
            at = slot * RECORD_BYTES
            self._unflushed.append(_Page(True, at, bytes(self._records[at : at + RECORD_BYTES])))
        super().write_records(records)

    def flush(self) -> None:
        super().flush()
        self._unflushed.clear()

    def _take(self) -> None:
        if self.writes_fail:
            raise OSError(28, "no space left on device")

    def trouble(self, kind: str | None) -> None:
        """It is slow, full or dead, or the bucket unreachable, from now on; None: no more."""
        self.calls.slow_s = self.pins.calls.slow_s = SLOW_S if kind == "slow" else 0.0
        self.writes_fail = kind == "full"
        self.failing = kind == "dead"
        self.pins.failing = kind in ("full", "dead")
        self.objects.failing = kind == "unreachable"

    # --- as the world does it -----------------------------------------------------------------------------

    def killed(self) -> None:
        """The process that uses it is gone: each call under way got as far as it got."""
        for function in self.calls.abandoned():
            self.writes_left = self._rng.randrange(8)
            with suppress(PowerCut, OSError):
                function()
        self.writes_left = None
        self.pins.killed()

    def lose_power(self) -> None:
        """After :meth:`killed`: of what was not flushed, each write may not have happened, whatever came after it."""
        self.lost_power += 1
        self.pins.lose_power()
        for page in reversed(self._unflushed):
            if self._rng.random() < 0.5:
                target = self._records if page.records else self.data
                target[page.at : page.at + len(page.before)] = page.before
        self._unflushed.clear()

    def flip(self) -> None:
        """One byte of a block that is held, or of a record, is another."""
        whole = self.whole()
        if not whole:
            return
        record = whole[self._rng.randrange(len(whole))]
        if self._rng.random() < 0.2:
            self._records[record.slot * RECORD_BYTES + self._rng.randrange(RECORD_BYTES)] ^= 0x10
        else:
            self.data[record.slot * self.slot_bytes + self._rng.randrange(record.block.size_bytes)] ^= 0x10
        self.flipped += 1

    def whole(self) -> list[Record]:
        """Every block with a record and the bytes that it promises, of two records the newer: by the bytes alone."""
        newest: dict[BlockHash, Record] = {}
        for record in unpack_records(bytes(self._records), Layout(self.slot_bytes, self.slots_max)):
            if isinstance(record, int):
                continue
            known = newest.get(record.block.hash)
            if known is None or known.sequence < record.sequence:
                newest[record.block.hash] = record
        return [record for record in newest.values() if self._matches(record)]

    def _matches(self, record: Record) -> bool:
        at = record.slot * self.slot_bytes
        return checksum(memoryview(self.data)[at : at + record.block.size_bytes]) == record.block.checksum
