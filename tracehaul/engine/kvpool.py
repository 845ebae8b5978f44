"""KV memory on a CPU: one array ``[layers, 2, kv_heads, tokens, head_dim]`` that lives as long as the engine.

A sequence owns one contiguous range of tokens, so attention reads its keys and values as strided views and a
block is ``layers * 2 * kv_heads`` contiguous pieces. A GPU has :class:`tracehaul.engine.paged_pool.PagedPool`.
"""

import math
import mmap
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from tracehaul.wire.hashing import KVLayout


class Cut(NamedTuple):
    """A block's KV in the pool, and its bytes in the layout's packed form, exactly as long."""

    start: int
    """Its first token in the pool."""
    tokens: int
    packed: memoryview


class KVPool(Protocol):
    """The array, and copies between it and packed blocks. Copies run on any one thread; ranges are the caller's."""

    @property
    def tensor(self) -> torch.Tensor:
        """``[layers, 2, kv_heads, tokens, head_dim]`` on the compute device."""
        ...

    def attach(self, memory: memoryview) -> None:
        """Most packed blocks will lie in this memory."""
        ...

    def pack(self, cuts: Sequence[Cut]) -> None:
        """Copy KV out; the bytes are in place on return."""
        ...

    def unpack(self, cuts: Sequence[Cut]) -> None:
        """Inverse of :meth:`pack`; the KV is in place on return."""
        ...

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy tokens between two ranges that do not overlap."""
        ...


class HostPool:
    """The array in this process's memory, on huge pages and touched in advance.

    First touch of 4 KiB pages is slow enough (around 0.4 GB/s on a small virtual machine) to show in a prefill.
    """

    def __init__(self, layout: KVLayout, tokens_max: int, dtype: torch.dtype) -> None:
        shape = (layout.layers, 2, layout.kv_heads, tokens_max, layout.head_dim)
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self._tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
        self._tensor.zero_()  # touches every page, on all of torch's threads
        self._head_bytes = layout.head_dim * dtype.itemsize
        # numpy, not torch, copies blocks: its copies are plain memcpy and start no threads beside the compute's.
        self._rows = np.frombuffer(memory, np.uint8).reshape(math.prod(shape[:3]), tokens_max * self._head_bytes)

    @property
    def tensor(self) -> torch.Tensor:
        return self._tensor

    def attach(self, memory: memoryview) -> None:
        """It is this process's own, as the pool is."""

    def pack(self, cuts: Sequence[Cut]) -> None:
        for start, tokens, packed in cuts:
            np.copyto(self._block(packed, tokens), self._range(start, tokens))

    def unpack(self, cuts: Sequence[Cut]) -> None:
        for start, tokens, packed in cuts:
            np.copyto(self._range(start, tokens), self._block(packed, tokens))

    def move(self, source: int, target: int, tokens: int) -> None:
        np.copyto(self._range(target, tokens), self._range(source, tokens))

    def _range(self, start: int, tokens: int) -> np.ndarray:
        return self._rows[:, start * self._head_bytes : (start + tokens) * self._head_bytes]

    def _block(self, block: memoryview, tokens: int) -> np.ndarray:
        return np.frombuffer(block, np.uint8).reshape(len(self._rows), tokens * self._head_bytes)
