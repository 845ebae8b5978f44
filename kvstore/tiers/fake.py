"""A slot device and a pin file in memory, for the simulator and for tests: they survive a node's life, and fail where
told to.

What it cannot prove: that a real file system and a real disk order and keep writes as the file's format needs.
"""

from collections.abc import Mapping, Sequence

from kvstore.tiers.records import ERASED, RECORD_BYTES


class PowerCut(BaseException):
    """The moment at which a process that uses the device is gone: nobody handles it."""


class MemoryDevice:
    """Slots in a bytearray. ``writes_left``, if set, is how many pages can be written before :class:`PowerCut`."""

    def __init__(self, slots_max: int, slot_bytes: int) -> None:
        self.slots_max = slots_max
        self.slot_bytes = slot_bytes
        self.data = bytearray(slots_max * slot_bytes)
        self._records = bytearray(slots_max * RECORD_BYTES)
        self.writes_left: int | None = None
        self.failing = False
        """Whether every call raises OSError."""

    def records(self) -> bytes:
        return bytes(self._records)

    def read(self, slots: Sequence[int], views: Sequence[memoryview]) -> None:
        self._try()
        for slot, view in zip(slots, views, strict=True):
            at = slot * self.slot_bytes
            view[:] = memoryview(self.data)[at : at + view.nbytes]

    def write(self, slots: Sequence[int], views: Sequence[memoryview]) -> None:
        self._try()
        for slot, view in zip(slots, views, strict=True):
            at = slot * self.slot_bytes
            for start in range(0, view.nbytes, 4096):
                self._spend()
                self.data[at + start : at + start + 4096] = view[start : start + 4096]

    def write_records(self, records: Mapping[int, bytes]) -> None:
        self._try()
        for slot, record in sorted(records.items()):
            assert len(record) == len(ERASED)
            self._spend()
            self._records[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES] = record

    def flush(self) -> None:
        self._try()

    def close(self) -> None:
        pass

    def _try(self) -> None:
        if self.failing:
            raise OSError(5, "input/output error")

    def _spend(self) -> None:
        if self.writes_left is None:
            return
        if self.writes_left == 0:
            raise PowerCut
        self.writes_left -= 1


class MemoryPinFile:
    """A :class:`kvstore.node.pin_journal.PinFile`. ``bytes_left``, if set, is how many can be written before
    :class:`PowerCut`."""

    def __init__(self) -> None:
        self.data = b""
        self.bytes_left: int | None = None
        self.failing = False
        """Whether every write raises OSError, after half of it."""

    def load(self) -> bytes:
        return self.data

    def append(self, data: bytes) -> None:
        if self.failing:
            self.data += data[: len(data) // 2]
            raise OSError(28, "no space left on device")
        self.data += data[: self.bytes_left]
        self._spend(len(data))

    def replace(self, data: bytes) -> None:
        if self.failing:
            raise OSError(28, "no space left on device")
        self._spend(len(data))
        self.data = data

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _spend(self, nbytes: int) -> None:
        if self.bytes_left is None:
            return
        if nbytes > self.bytes_left:
            raise PowerCut
        self.bytes_left -= nbytes
