"""The engine's own memory, a block at a time: it is copied from and into, and never lent to a transfer.

A transfer that misses its deadline may land later, into memory that an engine has long used for something else. So
bytes move between the store and staging memory of ours, and a page is touched only inside the engine's own call.
"""

import ctypes
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Page(Protocol):
    """Where the engine keeps one block, in as many pieces as it likes."""

    @property
    def nbytes(self) -> int:
        """Of the whole block."""
        ...

    def save(self, into: memoryview) -> None:
        """Copy the block out, ``nbytes`` bytes; what it holds must not change meanwhile."""
        ...

    def load(self, source: memoryview) -> None:
        """Copy the block in."""
        ...


class HostPage:
    """A block in host memory: its pieces, one after the other, are its bytes."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = pieces
        self.nbytes = sum(piece.nbytes for piece in pieces)

    def save(self, into: memoryview) -> None:
        at = 0
        for piece in self._pieces:
            _copy(into[at : at + piece.nbytes], piece)
            at += piece.nbytes

    def load(self, source: memoryview) -> None:
        at = 0
        for piece in self._pieces:
            _copy(piece, source[at : at + piece.nbytes])
            at += piece.nbytes


def memory_at(address: int, nbytes: int) -> memoryview:
    """Memory of this process, as bytes. Whose it is must keep it."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _copy(to: memoryview, source: memoryview) -> None:
    # By numpy, since it lets go of the interpreter lock: the engine's other threads go on.
    np.copyto(np.frombuffer(to, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))
