"""A slot device in one preallocated file, past the page cache.

Every read and write is one system call over a run of neighbouring slots, straight from and into the arena. Process
and machine may end at any moment:

- *The process is killed.* What a call returned from is in the file. Bytes are written before the record that names
  them, records go as whole pages, and one is erased before its slot is written again: nothing published here is lost,
  nothing torn is found.
- *The machine loses power.* The device may lose or reorder what it took since the last :meth:`DiskFile.flush`. The
  blocks of those seconds may be gone; a record may name bytes that never arrived, which the block's checksum finds.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from kvstore.tiers.records import PAGE_BYTES, RECORD_BYTES, RECORDS_PER_PAGE, Layout, pack_header, unpack_header
from kvstore.tiers.slot_tier import STORES_MAX, SlotTier
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.wire.errors import Unavailable

log = Log(__name__)

RUN_SLOTS_MAX = 64
"""Slots in one system call; far below the kernel's limit of vectors."""


class NoDisk(Unavailable):
    """The file cannot be made, or is another process's: choose another place, or ask for less."""

    code = "no_disk"
    retriable = False


class DiskFile:
    """The :class:`kvstore.tiers.base.SlotDevice` in a file. Blocks for as long as it takes to reserve it.

    A file of another size is brought to ``layout``, or as near as can be, and keeps the blocks in slots that both
    have; one of another format or slot size starts empty.

    Raises:
        NoDisk: there is no room, no permission, or another process holds the file.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd, self.direct = _open(path)
        except OSError as error:
            raise NoDisk(f"cannot open the disk tier {path}: {error.strerror}") from error
        try:
            self._own()
            self._layout, self._records = self._take_over(layout)
        except OSError as error:
            os.close(self._fd)
            room = f"{layout.file_bytes / 2**30:.2f} GiB"
            raise NoDisk(f"cannot reserve {room} for the disk tier {path}: {error.strerror}") from error
        except NoDisk:
            os.close(self._fd)
            raise
        self.slot_bytes = self._layout.slot_bytes
        self.slots_max = self._layout.slots_max
        # Pages of records go side by side, but each one's images in their order.
        self._settled = threading.Condition()
        self._change = 0
        self._written: dict[int, int] = {}  # page -> the change that is in the file
        self._under_way: set[int] = set()

    def records(self) -> bytes:
        return bytes(self._records[: self.slots_max * RECORD_BYTES])

    def read(self, slots: Sequence[int], views: Sequence[memoryview]) -> None:
        for first, run in _runs(slots, views, self.slot_bytes):
            wanted = sum(view.nbytes for view in run)
            got = os.preadv(self._fd, run, self._offset(first))
            if got != wanted:
                raise OSError(errno.EIO, f"read {got} bytes of {wanted}")

    def write(self, slots: Sequence[int], views: Sequence[memoryview]) -> None:
        for first, run in _runs(slots, views, self.slot_bytes):
            self._write(run, self._offset(first))

    def write_records(self, records: Mapping[int, bytes]) -> None:
        with self._settled:
            for slot, record in records.items():
                assert len(record) == RECORD_BYTES
                self._records[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES] = record
            self._change += 1
            change = self._change
            pages = sorted({slot // RECORDS_PER_PAGE for slot in records})
            while late := [page for page in pages if self._written.get(page, 0) < change]:
                free = [page for page in late if page not in self._under_way]
                if free:
                    self._write_pages(free)
                else:
                    self._settled.wait()

    def _write_pages(self, pages: Sequence[int]) -> None:
        """Write pages that nobody is writing, as they are now; lets go of the lock meanwhile."""
        upto, runs = self._change, _neighbours(pages)
        images: list[tuple[int, mmap.mmap]] = []
        for first, count in runs:
            image = mmap.mmap(-1, count * PAGE_BYTES)
            image[:] = self._records[first * PAGE_BYTES : (first + count) * PAGE_BYTES]
            images.append((first, image))
        self._under_way.update(pages)
        self._settled.release()
        try:
            for first, image in images:
                self._write([memoryview(image)], self._layout.records_offset + first * PAGE_BYTES)
        finally:
            self._settled.acquire()
            self._under_way.difference_update(pages)
            self._settled.notify_all()  # after a failure, too: whoever needs these pages writes them itself
        self._written.update(dict.fromkeys(pages, upto))

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _offset(self, slot: int) -> int:
        return self._layout.data_offset + slot * self.slot_bytes

    def _write(self, run: Sequence[memoryview], offset: int) -> None:
        wanted = sum(view.nbytes for view in run)
        put = os.pwritev(self._fd, run, offset)
        if put != wanted:
            raise OSError(errno.EIO, f"wrote {put} bytes of {wanted}")

    def _own(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NoDisk(f"another process holds the disk tier {self._path}") from error

    def _take_over(self, wanted: Layout) -> tuple[Layout, mmap.mmap]:
        """The layout that the file now has, and its record region, page aligned."""
        page = mmap.mmap(-1, PAGE_BYTES)
        size = os.fstat(self._fd).st_size
        known = unpack_header(page[:]) if size and os.preadv(self._fd, [page], 0) == PAGE_BYTES else None
        layout = wanted.after(known) if known is not None and size >= known.file_bytes else None
        if known is None or layout is None:
            if size:
                log.warning("disk tier starts empty: the file has another layout", path=self._path, found=known)
            return wanted, self._make(wanted)
        records = mmap.mmap(-1, known.records_bytes)
        if os.preadv(self._fd, [records], known.records_offset) != known.records_bytes:
            raise OSError(errno.EIO, "the record region is cut short")
        if layout != known:
            log.info("disk tier has another size now", path=self._path, slots=layout.slots_max, before=known.slots_max)
            records = self._resize(known, layout, records)
        os.ftruncate(self._fd, layout.file_bytes)  # a growth that was cut short left it longer
        return layout, records

    def _make(self, layout: Layout) -> mmap.mmap:
        os.ftruncate(self._fd, 0)
        os.posix_fallocate(self._fd, 0, layout.file_bytes)
        self._write_header(layout)
        with contextlib.closing(_Directory(self._path.parent)) as directory:
            os.fsync(directory.fd)
        return mmap.mmap(-1, layout.records_bytes)

    def _resize(self, known: Layout, layout: Layout, records: mmap.mmap) -> mmap.mmap:
        """Write the record region where ``layout`` has it. Until the header says so, ``known`` stays true."""
        kept = min(known.slots_max, layout.slots_max) * RECORD_BYTES
        moved = mmap.mmap(-1, layout.records_bytes)
        moved[:kept] = records[:kept]
        if layout.slots_max > known.slots_max:
            os.posix_fallocate(self._fd, 0, layout.file_bytes)
        else:  # what these records name is about to be overwritten
            records[kept:] = bytes(len(records) - kept)
            self._write([memoryview(records)], known.records_offset)
            os.fsync(self._fd)
        self._write([memoryview(moved)], layout.records_offset)
        os.fsync(self._fd)
        self._write_header(layout)
        return moved

    def _write_header(self, layout: Layout) -> None:
        page = mmap.mmap(-1, PAGE_BYTES)
        page[:] = pack_header(layout)
        self._write([memoryview(page)], 0)
        os.fsync(self._fd)


class _Directory:
    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self.fd)


def _open(path: Path) -> tuple[int, bool]:
    """The file, and whether it is past the page cache."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    log.warning("the file system has no O_DIRECT: the disk tier also fills the page cache", path=path)
    return os.open(path, flags, 0o600), False


def _neighbours(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending pages as runs: (first, how many)."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and sum(runs[-1]) == page:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((page, 1))
    return runs


def _runs(slots: Sequence[int], views: Sequence[memoryview], slot_bytes: int) -> Iterator[tuple[int, list[memoryview]]]:
    """The slots in ascending order, cut where they are not neighbours: (first slot, its views)."""
    if not slots:
        return
    pairs = sorted(zip(slots, views, strict=True), key=lambda pair: pair[0])
    first, run = pairs[0][0], [pairs[0][1]]
    for (before, view_before), (slot, view) in pairwise(pairs):
        if slot == before + 1 and view_before.nbytes == slot_bytes and len(run) < RUN_SLOTS_MAX:
            run.append(view)
        else:
            yield first, run
            first, run = slot, [view]
    yield first, run


READ_THREADS = 16
"""The depth of reads. Measured: threads in preadv over runs of slots read as fast as fio with io_uring at depth 16,
and faster than NIXL's POSIX plugin; the io_uring binding that exists cannot read into an arena."""
WRITE_THREADS = STORES_MAX
"""One for each batch: some wait for the device while others write records. Runs are long, so depth comes from their
length, too."""


async def open_disk(path: Path, file_bytes: int, slot_bytes: int) -> SlotTier:
    """The disk tier in a file that takes at most ``file_bytes``, with every block that was published in it.

    Raises:
        NoDisk: the file cannot be had, or would hold no block.
    """
    layout = Layout.within(file_bytes, slot_bytes)
    if layout is None:
        raise NoDisk(f"a disk tier of {file_bytes} bytes holds no block of {slot_bytes} bytes")
    began_s = clock.perf_s()
    reads, writes = ThreadOffload("disk-read", READ_THREADS), ThreadOffload("disk-write", WRITE_THREADS)
    device = await reads.run(lambda: DiskFile(path, layout))
    tier = SlotTier("disk", device, reads, writes)
    log.info(
        "disk tier is open",
        path=path,
        slots=layout.slots_max,
        blocks=len(tier),
        unreadable_records=tier.stats.unreadable,
        direct=device.direct,
        took_s=clock.perf_s() - began_s,
    )
    return tier
