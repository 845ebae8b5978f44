"""KV memory in blocks that lie anywhere: ``[blocks, layers, 2, kv_heads, block_tokens, head_dim]``.

A full block is contiguous and in the very form that the stores keep, so moving one is a single copy, and a data
plane that is shown this memory needs one descriptor per block.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from tracehaul.engine.kvpool import Cut
from tracehaul.wire.hashing import KVLayout


class PagedPool:
    """Implements :class:`tracehaul.engine.kvpool.KVPool`, on a CUDA device or, for tests, on the CPU.

    Token ``t`` of the pool is token ``t % block_tokens`` of block ``t // block_tokens``; copies begin at a block's
    start. Its last block belongs to nobody: padding is written there.

    On a CUDA device blocks are copied on a stream of their own: to and from attached memory directly, all at once,
    others through one pinned staging buffer. A copy must not start before the compute stream has written what it
    reads: the engine's ``run`` ends with a synchronization, and callers pack only tokens whose ``run`` has returned.
    """

    def __init__(self, layout: KVLayout, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (layout.layers, 2, layout.kv_heads, layout.block_tokens, layout.head_dim)
        self._tensor = torch.zeros((blocks + 1, *self._shape), dtype=dtype, device=device)
        cuda = device.type == "cuda"
        self._staging = torch.empty(layout.block_bytes, dtype=torch.uint8, pin_memory=cuda)
        self._attached = range(0)
        self._stream = torch.cuda.Stream(device) if cuda else None
        if cuda:
            torch.cuda.synchronize(device)

    @property
    def tensor(self) -> torch.Tensor:
        return self._tensor

    def attach(self, memory: memoryview) -> None:
        """The device may then read and write it by itself. Where its driver refuses, blocks go through the staging."""
        start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        runtime = torch.cuda.cudart() if self._stream is not None else None
        if runtime is not None and int(runtime.cudaHostRegister(start, len(memory), 0)) == 0:
            self._attached = range(start, start + len(memory))

    def pack(self, cuts: Sequence[Cut]) -> None:
        with torch.inference_mode(), self._copying():
            for start, tokens, packed in cuts:
                held = self._block(start, tokens).contiguous()  # a full block already is
                out = torch.frombuffer(packed, dtype=torch.uint8)
                direct = out.data_ptr() in self._attached
                target = out if direct else self._staging[: len(packed)]
                target.copy_(held.view(-1).view(torch.uint8), non_blocking=True)
                if not direct:
                    self._settle()
                    out.copy_(target)
            self._settle()

    def unpack(self, cuts: Sequence[Cut]) -> None:
        with torch.inference_mode(), self._copying():
            for start, tokens, packed in cuts:
                source = torch.frombuffer(packed, dtype=torch.uint8)
                if source.data_ptr() not in self._attached:
                    self._settle()  # the last block may still be on its way from there
                    source = self._staging[: len(packed)].copy_(source)
                target = self._block(start, tokens)
                placed = source.to(self._tensor.device, non_blocking=True).view(self._tensor.dtype)
                target.copy_(placed.view(target.shape))
            self._settle()

    def move(self, source: int, target: int, tokens: int) -> None:
        block_tokens = self._shape[3]
        with torch.inference_mode(), self._copying():
            for at in range(0, tokens, block_tokens):
                self._block(target + at, block_tokens).copy_(self._block(source + at, block_tokens))
            self._settle()

    def _block(self, start: int, tokens: int) -> torch.Tensor:
        """``[layers, 2, kv_heads, tokens, head_dim]`` of one block."""
        block, offset = divmod(start, self._shape[3])
        assert offset == 0, "a copy that does not begin at a block's start"
        return self._tensor[block, :, :, :, :tokens]

    def _copying(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _settle(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
