"""Memory that every transport can register: a pre-faulted memory file. Where none can be made, shared memory alone
cannot use it.

First touch of fresh memory is an order of magnitude slower than copying into it, so all of it is paid for at
start. The file has no name in any file system: nothing is left behind, however the process ends.
"""

import ctypes
import errno
import fcntl
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tracehaul.runtime.log import Log
from tracehaul.wire.errors import Unavailable

log = Log(__name__)

PAGE_BYTES = mmap.PAGESIZE
POPULATE_CHUNK_BYTES = 64 << 20
POPULATE_THREADS_MAX = 8
HEADROOM_BYTES = 64 << 20
"""What an allocation leaves free of the available memory, so that the process itself can go on."""

FILE_PREFIX = "tracehaul-"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_FORBIDDEN = (errno.ENOSYS, errno.EPERM, errno.EACCES)
"""How a sandbox answers where memory files are not allowed."""

_MADV_POPULATE_WRITE = 23  # Linux 5.14; fails with an error code where a touch would be killed by SIGBUS
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class NoMemory(Unavailable):
    """The machine, or the memory limit of this process, has no room for an arena: ask for less."""

    code = "no_memory"
    retriable = False

    def __init__(self, name: str, asked_bytes: int, available_bytes: int) -> None:
        super().__init__(
            f"no room for {name}: asked for {asked_bytes} bytes ({asked_bytes / 2**30:.2f} GiB), "
            f"available are {available_bytes} bytes ({available_bytes / 2**30:.2f} GiB)"
        )
        self.asked_bytes = asked_bytes
        self.available_bytes = available_bytes


class FileMemory:
    """A mapped memory file: the :class:`tracehaul.transfer.base.Memory` of all transports but the simulator's.

    ``fd`` -1: of this process alone, without a file.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        self._buffer = memoryview(mmap.mmap(fd, _page_round(nbytes)))[:nbytes]

    @property
    def buffer(self) -> memoryview:
        return self._buffer

    @property
    def fd(self) -> int:
        return self._fd

    def close(self) -> None:
        """Close the file. The pages go when the last view of the buffer goes; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._buffer = memoryview(b"")


def allocate(nbytes: int, name: str) -> FileMemory:
    """Memory of ``nbytes`` zero bytes, page aligned, every page present. Blocks for about 0.5 s per GiB.

    Raises:
        NoMemory: there is no room for it; nothing is allocated.
    """
    assert nbytes > 0, nbytes
    room = available_bytes() - HEADROOM_BYTES
    if nbytes > room:
        raise NoMemory(name, nbytes, max(room, 0))
    # The random part lets a peer verify that a descriptor number still means this very file.
    label = f"{FILE_PREFIX}{name[:100]}-{os.urandom(8).hex()}"
    fd = _memory_file(label)
    try:
        if fd >= 0:
            os.ftruncate(fd, _page_round(nbytes))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        memory = FileMemory(fd, nbytes)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG):
            raise NoMemory(name, nbytes, max(room, 0)) from error
        raise
    try:
        populate(memory.buffer)
    except OSError as error:
        memory.close()
        raise NoMemory(name, nbytes, max(room, 0)) from error
    return memory


def _memory_file(label: str) -> int:
    """A new one's descriptor; -1 where they are not allowed."""
    try:
        return os.memfd_create(label, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        if error.errno not in _FORBIDDEN:
            raise
        log.warning("no memory file can be made: peers on this host reach this process by its network", reason=error)
        return -1


def is_memory_file(fd: int) -> bool:
    """Whether :func:`allocate` made that file: a private one that can never shrink under who has it mapped."""
    if not os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:{FILE_PREFIX}"):
        return False
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:  # a file of another kind, whatever its name
        return False


def populate(buffer: memoryview) -> None:
    """Make every page of a mapped file present and writable in this process, without changing a byte.

    Releases the interpreter lock, so it may run beside an event loop.

    Raises:
        OSError: the pages cannot be had.
    """
    start = address_of(buffer)
    assert start % PAGE_BYTES == 0, "a mapping starts at a page"
    total = _page_round(buffer.nbytes)
    chunks = [(start + at, min(POPULATE_CHUNK_BYTES, total - at)) for at in range(0, total, POPULATE_CHUNK_BYTES)]
    threads = min(len(chunks), os.cpu_count() or 1, POPULATE_THREADS_MAX)
    if threads < 2:
        for chunk in chunks:
            _populate_chunk(chunk)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="populate") as pool:
        list(pool.map(_populate_chunk, chunks))


def _populate_chunk(chunk: tuple[int, int]) -> None:
    address, nbytes = chunk
    if _libc.madvise(address, nbytes, _MADV_POPULATE_WRITE) == 0:
        return
    code = ctypes.get_errno()
    # An older kernel does not know the advice: its pages come on first touch, slower but no less correct.
    if code != errno.EINVAL:
        raise OSError(code, os.strerror(code))


def address_of(buffer: memoryview) -> int:
    """Where the buffer's first byte is in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def available_bytes() -> int:
    """Memory that can be allocated without swapping: the machine's, or what is left of a control group's limit."""
    available = [_meminfo_available_bytes()]
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, usage = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif controllers == "memory":
            mount, limit, usage = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = Path(path)
        for folder in (group, *group.parents):
            left = _group_left_bytes(f"{mount}{folder}".rstrip("/"), limit, usage)
            if left is not None:
                available.append(left)
    return min(available)


def _group_left_bytes(folder: str, limit: str, usage: str) -> int | None:
    limit_text, usage_text = _read(f"{folder}/{limit}").strip(), _read(f"{folder}/{usage}").strip()
    if not limit_text.isdigit() or not usage_text.isdigit():
        return None  # "max", or no such group here
    # Cached file pages count as used, but are given up first.
    cached = 0
    for line in _read(f"{folder}/memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == "total_inactive_file" or (name == "inactive_file" and limit == "memory.max"):
            cached = int(value)
    return max(0, int(limit_text) - int(usage_text) + cached)


def _meminfo_available_bytes() -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux reports MemAvailable since 3.14")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _page_round(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
