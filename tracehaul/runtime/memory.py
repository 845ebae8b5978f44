"""Memory that is free and that the C library keeps."""

import ctypes

_library = ctypes.CDLL(None)
_malloc_trim = getattr(_library, "malloc_trim", None)
_mallopt = getattr(_library, "mallopt", None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

MAPPED_BYTES = 1 << 20
KEPT_BYTES = 16 << 20
ARENAS = 2


def keep_little() -> None:
    """Have the C library (glibc) keep little of what is freed: for a process whose memory is many small things and now
    and then a large one.

    Blocks of a megabyte and more are mapped one by one, so that they go back at once: left to itself glibc puts those
    that are no larger than one it has freed, up to 32 MiB, into heaps that small things keep from shrinking. And all
    threads share two heaps: what is free in one is of no use to another. To be called before there are threads.
    """
    if _mallopt is not None:
        _mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        _mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        _mallopt(_M_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Return it to the system, where the C library can (glibc does so by itself only at the end of its heap).

    Takes milliseconds per hundred megabytes, without the interpreter's lock: for a thread.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
