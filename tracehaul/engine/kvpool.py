"""KV memory: one array ``[layers, 2, kv_heads, tokens, head_dim]`` that lives as long as the engine.

A sequence owns one contiguous range of tokens, so attention reads its keys and values as strided views and a
block is ``layers * 2 * kv_heads`` contiguous pieces. That is the right shape for a CPU; a GPU with many sequences
would want paged attention, which is why ranges do not show in the engine's interface.
"""

import math
import mmap
from typing import Protocol

import numpy as np
import torch

from tracehaul.wire.hashing import KVLayout


class KVPool(Protocol):
    """The array, and copies between it and packed blocks. Copies run on any one thread; ranges are the caller's."""

    @property
    def tensor(self) -> torch.Tensor:
        """``[layers, 2, kv_heads, tokens, head_dim]`` on the compute device."""
        ...

    def pack(self, start: int, tokens: int, out: memoryview) -> None:
        """Copy tokens ``[start, start + tokens)`` out in the layout's packed form; ``out`` is exactly that long."""
        ...

    def unpack(self, start: int, tokens: int, block: memoryview) -> None:
        """Inverse of :meth:`pack`; the bytes are in place on return."""
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

    def pack(self, start: int, tokens: int, out: memoryview) -> None:
        np.copyto(self._block(out, tokens), self._range(start, tokens))

    def unpack(self, start: int, tokens: int, block: memoryview) -> None:
        np.copyto(self._range(start, tokens), self._block(block, tokens))

    def move(self, source: int, target: int, tokens: int) -> None:
        np.copyto(self._range(target, tokens), self._range(source, tokens))

    def _range(self, start: int, tokens: int) -> np.ndarray:
        return self._rows[:, start * self._head_bytes : (start + tokens) * self._head_bytes]

    def _block(self, block: memoryview, tokens: int) -> np.ndarray:
        return np.frombuffer(block, np.uint8).reshape(len(self._rows), tokens * self._head_bytes)


class DevicePool:
    """The array on a CUDA device; blocks pass through one pinned staging buffer on a stream of their own.

    A copy must not start before the compute stream has written what it reads: the engine's ``run`` ends with a
    synchronization, and callers pack only tokens whose ``run`` has returned.
    """

    def __init__(self, layout: KVLayout, tokens_max: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (layout.layers, 2, layout.kv_heads)
        self._tensor = torch.zeros((*self._shape, tokens_max, layout.head_dim), dtype=dtype, device=device)
        self._staging = torch.empty(layout.block_bytes, dtype=torch.uint8, pin_memory=True)
        self._staging_bytes = self._staging.numpy()
        self._stream = torch.cuda.Stream(device)
        torch.cuda.synchronize(device)

    @property
    def tensor(self) -> torch.Tensor:
        return self._tensor

    def pack(self, start: int, tokens: int, out: memoryview) -> None:
        size = len(out)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            packed = self._tensor[:, :, :, start : start + tokens].contiguous()
            self._staging[:size].copy_(packed.view(-1).view(torch.uint8), non_blocking=True)
            self._stream.synchronize()
        np.copyto(np.frombuffer(out, np.uint8), self._staging_bytes[:size])

    def unpack(self, start: int, tokens: int, block: memoryview) -> None:
        size = len(block)
        np.copyto(self._staging_bytes[:size], np.frombuffer(block, np.uint8))
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            packed = self._staging[:size].to(self._tensor.device, non_blocking=True).view(self._tensor.dtype)
            head_dim = self._tensor.shape[-1]
            self._tensor[:, :, :, start : start + tokens].copy_(packed.view(*self._shape, tokens, head_dim))
            self._stream.synchronize()

    def move(self, source: int, target: int, tokens: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            kept = self._tensor[:, :, :, source : source + tokens]
            self._tensor[:, :, :, target : target + tokens].copy_(kept)
            self._stream.synchronize()


def make_pool(layout: KVLayout, tokens_max: int, dtype: torch.dtype, device: torch.device) -> KVPool:
    """The pool for ``device``.

    Raises:
        OSError, torch.OutOfMemoryError: the memory is not there.
    """
    match device.type:
        case "cpu":
            return HostPool(layout, tokens_max, dtype)
        case _:
            return DevicePool(layout, tokens_max, dtype, device)
