"""Memory that is free and that the C library keeps."""

import ctypes
import gc

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Return it to the system, where the C library can (glibc does so by itself only at the end of its heap).

    Takes milliseconds per hundred megabytes, without the interpreter's lock: for a thread.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


NEW_OBJECTS = 50_000
"""So many more objects are there than before when the collector looks for cycles among them."""


def settle() -> None:
    """What is there now stays: the collector does not look at it again, and at what is new less often.

    For a process that makes many small objects and hardly a cycle: most of what the collector does there is in vain.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS)
