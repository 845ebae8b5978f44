"""Memory that is free and that the C library keeps."""

import ctypes

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Return it to the system, where the C library can (glibc does so by itself only at the end of its heap).

    Takes milliseconds per hundred megabytes, without the interpreter's lock: for a thread.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
