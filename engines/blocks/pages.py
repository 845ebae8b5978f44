"""The engine's own memory, a block at a time.

Between it and a store of this host its bytes are copied by this process alone, and it can call that off: see
:mod:`.direct`. Any other transfer that misses its deadline may land later, into memory that an engine has long used for
something else; so there bytes go by staging memory of ours, and a page is touched only inside the engine's own call.
"""

import ctypes
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


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

    def __init__(self, addresses: NDArray[np.uint64], sizes: NDArray[np.uint64], memory: object) -> None:
        """``memory``: whose the pieces are; it lives as long as the page."""
        self.addresses = addresses
        self.sizes = sizes
        self.nbytes = int(sizes.sum())
        self._memory = memory

    @classmethod
    def of(cls, pieces: Sequence[memoryview]) -> "HostPage":
        """Those pieces."""
        return cls(_words([_address(piece) for piece in pieces]), _words([piece.nbytes for piece in pieces]), pieces)

    def save(self, into: memoryview) -> None:
        at = _address(into)
        for address, nbytes in zip(self.addresses.tolist(), self.sizes.tolist(), strict=True):
            ctypes.memmove(at, address, nbytes)  # without the interpreter lock: the engine's other threads go on
            at += nbytes

    def load(self, source: memoryview) -> None:
        at = _address(source)
        for address, nbytes in zip(self.addresses.tolist(), self.sizes.tolist(), strict=True):
            ctypes.memmove(address, at, nbytes)
            at += nbytes


def _address(memory: memoryview) -> int:
    return np.frombuffer(memory, dtype=np.uint8).ctypes.data


def _words(numbers: Sequence[int]) -> NDArray[np.uint64]:
    return np.array(numbers, dtype=np.uint64)
