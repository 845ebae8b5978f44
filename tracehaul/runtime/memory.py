"""Memory that is free and that the C library keeps."""

import ctypes
import gc

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


NEW_OBJECTS = 10_000
"""So many more objects are there than before when the collector looks for cycles among them."""
YOUNG, MIDDLE = 2, 50
"""After so many looks at the newest objects the collector looks at those that survived one, too; after so many of
these, at all. Half a million survivors, as many as thousands of open calls have, take it a fifth of a second at once:
they are looked at in parts, and together seldom."""


def settle() -> None:
    """What is there now stays: the collector does not look at it again, and at what is new less often.

    For a process that makes many small objects and hardly a cycle: most of what the collector does there is in vain.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, YOUNG, MIDDLE)
