"""The forward pass over paged KV memory: what a GPU runs, with its decode batches captured in CUDA graphs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn.functional import linear

from tracehaul.engine.model import Segment
from tracehaul.engine.rope import rope_tables
from tracehaul.engine.weights import LayerWeights, Weights

GRAPH_BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Sizes of the captured decode batches; a smaller one is padded to the next, a larger one runs without a graph."""

ALIGNED_BYTES = 16

Replay = Callable[[], None]
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]
"""Turns a computation on fixed memory into one that is replayed, and the memory of its result."""


class Attention(Protocol):
    """:func:`tracehaul.engine.paged_attention.attend_paged`."""

    def __call__(
        self,
        queries: torch.Tensor,
        kv: torch.Tensor,
        tables: torch.Tensor,
        spans: torch.Tensor,
        tiles: torch.Tensor,
        tile_tokens: int,
        window: int | None,
    ) -> torch.Tensor:
        """See there."""
        ...


class AddNorm(Protocol):
    """:func:`tracehaul.engine.paged_kernels.add_norm`."""

    def __call__(
        self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        """See there."""
        ...


class Place(Protocol):
    """:func:`tracehaul.engine.paged_kernels.place`."""

    def __call__(
        self,
        qkv: torch.Tensor,
        norms: torch.Tensor | None,
        eps: float,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        positions: torch.Tensor,
        blocks: torch.Tensor,
        offsets: torch.Tensor,
        kv: torch.Tensor,
        heads: int,
    ) -> torch.Tensor:
        """See there."""
        ...


class Kernels(NamedTuple):
    """What is computed between a layer's products."""

    attend: Attention
    tile_tokens: Callable[[int, bool], int]
    """:func:`tracehaul.engine.paged_attention.tokens_per_tile`"""
    add_norm: AddNorm
    place: Place
    gate: Callable[[torch.Tensor], torch.Tensor]
    """:func:`tracehaul.engine.paged_kernels.gate`"""


class _Inputs(NamedTuple):
    """All that an iteration reads beside weights and KV, on the device."""

    tokens: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    """Where each token's KV goes: the block, and the token in it."""
    offsets: torch.Tensor
    sampled: torch.Tensor
    spans: torch.Tensor
    tiles: torch.Tensor
    tables: torch.Tensor


Arrays = list["np.ndarray[Any, np.dtype[Any]]"]
"""Inputs on the host, in the order of :class:`_Inputs`."""


class PagedModel:
    """Weights, tables, and the pool's memory. Used from one thread.

    ``pool`` is :class:`tracehaul.engine.paged_pool.PagedPool`'s tensor. With ``capture``, decode batches are captured
    here and now, the largest first, so that the smaller ones share its memory.
    """

    def __init__(self, weights: Weights, pool: torch.Tensor, kernels: Kernels, capture: Capture | None) -> None:
        self._weights = weights
        self._config = weights.config
        self._pool = pool
        self._device = pool.device
        self._kernels = kernels
        group = self._config.heads // self._config.kv_heads
        self._chunk_tile, self._decode_tile = kernels.tile_tokens(group, False), kernels.tile_tokens(group, True)
        self._block_tokens = pool.shape[4]
        self._rope = rope_tables(weights.config, weights.embedding.dtype, self._device)
        self._norms = [
            None if layer.q_norm is None or layer.k_norm is None else torch.stack([layer.q_norm, layer.k_norm])
            for layer in weights.layers
        ]
        self._graphs: dict[int, _Graph] = {}
        if capture is not None:
            for batch in reversed(GRAPH_BATCHES):
                self._graphs[batch] = self._captured(batch, capture)

    def forward(
        self, tokens: Sequence[int], segments: Sequence[Segment], tables: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> torch.Tensor:
        """Append every segment's tokens to its KV; float32 logits ``[len(rows), vocab]`` of those rows, on the device.

        ``tables`` are the sequences' blocks, one table per segment; ``Segment.base`` is not looked at. What is
        returned is overwritten by the next call. Runs under ``inference_mode``.

        Raises:
            IndexError: a token is outside the vocabulary. On the device that would end the process's use of it.
        """
        if not 0 <= min(tokens) <= max(tokens) < self._config.vocab_size:
            raise IndexError("a token is outside the vocabulary")
        every_row = len(rows) == len(tokens) == len(segments)
        batch = next((size for size in GRAPH_BATCHES if size >= len(segments)), None)
        arrays = self._arrays(tokens, segments, tables, rows)
        if every_row and batch is not None and self._graphs:
            return self._graphs[batch].run(arrays)
        decode = len(tokens) == len(segments)
        return self._compute(_placed(arrays, self._device), self._decode_tile if decode else self._chunk_tile)

    # --- inputs -------------------------------------------------------------------------------------------

    def _arrays(
        self, tokens: Sequence[int], segments: Sequence[Segment], tables: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> Arrays:
        size = self._block_tokens
        used = [-(-(s.past + s.tokens) // size) for s in segments]
        table = np.zeros((len(segments), max(used)), np.int32)
        for at, (blocks, held) in enumerate(zip(used, tables, strict=True)):
            table[at, :blocks] = held[:blocks]
        positions = np.concatenate([np.arange(s.past, s.past + s.tokens) for s in segments])
        owners = np.repeat(np.arange(len(segments)), [s.tokens for s in segments])
        tile = self._decode_tile if len(tokens) == len(segments) else self._chunk_tile
        tiles = [(at, first) for at, s in enumerate(segments) for first in range(0, s.tokens, tile)]
        return [
            np.asarray(tokens, np.int64),
            positions.astype(np.int64),
            table[owners, positions // size].astype(np.int64),
            (positions % size).astype(np.int64),
            np.asarray(rows, np.int64),
            np.asarray([(s.row, s.tokens, s.past) for s in segments], np.int32),
            np.asarray(tiles, np.int32),
            table,
        ]

    def _captured(self, batch: int, capture: Capture) -> "_Graph":
        """A graph for ``batch`` sequences, each of which is for now the padding: one token in nobody's block."""
        nobody = len(self._pool) - 1
        padding = self._arrays(
            [0] * batch, [Segment(row, 1, 0, 0) for row in range(batch)], [[nobody]] * batch, range(batch)
        )
        blocks_max = min(nobody, -(-self._config.context_max // self._block_tokens))
        tables = torch.full((batch, blocks_max), nobody, dtype=torch.int32, device=self._device)
        return _Graph(padding[:-1], tables, capture, self._compute_decode)

    # --- the layers ---------------------------------------------------------------------------------------

    def _compute_decode(self, inputs: _Inputs) -> torch.Tensor:
        return self._compute(inputs, self._decode_tile)

    def _compute(self, inputs: _Inputs, tile_tokens: int) -> torch.Tensor:
        hidden = self._weights.embedding[inputs.tokens].float()
        added = None
        for at, layer in enumerate(self._weights.layers):
            added = self._layer(layer, self._norms[at], self._pool[:, at], hidden, added, inputs, tile_tokens)
        if added is not None:
            hidden.add_(added)
        return linear(self._norm(hidden[inputs.sampled], None, self._weights.norm), self._weights.head).float()

    def _layer(
        self,
        layer: LayerWeights,
        norms: torch.Tensor | None,
        kv: torch.Tensor,
        hidden: torch.Tensor,
        added: torch.Tensor | None,
        inputs: _Inputs,
        tile_tokens: int,
    ) -> torch.Tensor:
        """One decoder layer over ``hidden`` and what is to be added to it; returns what is then to be added.

        ``kv`` is the layer's part of the pool.
        """
        c, do = self._config, self._kernels
        qkv = linear(self._norm(hidden, added, layer.attention_norm), layer.qkv, layer.qkv_bias)
        rope = self._rope if layer.rope else None
        queries = do.place(qkv, norms, c.norm_eps, rope, inputs.positions, inputs.blocks, inputs.offsets, kv, c.heads)
        attended = do.attend(queries, kv, inputs.tables, inputs.spans, inputs.tiles, tile_tokens, layer.window)
        attended = linear(attended.view(len(hidden), -1), layer.out, layer.out_bias)
        gate_up = linear(self._norm(hidden, attended, layer.mlp_norm), layer.gate_up, layer.gate_up_bias)
        return linear(do.gate(gate_up), layer.down, layer.down_bias)

    def _norm(self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        return self._kernels.add_norm(hidden, added, weight, self._config.norm_eps, self._weights.dtype)


class _Graph:
    """A decode batch of fixed size on fixed memory: filled in, replayed, read. ``padding`` is all but the tables."""

    def __init__(
        self, padding: Arrays, tables: torch.Tensor, capture: Capture, compute: Callable[[_Inputs], torch.Tensor]
    ) -> None:
        self._padding = padding
        self._tables = tables
        self._nobody = int(tables[0, 0])
        self._fixed = _packed(padding, tables.device).to(tables.device)
        inputs = _Inputs._make([*_unpacked(self._fixed, padding), tables])
        self._replay, self._logits = capture(lambda: compute(inputs))

    def run(self, arrays: Arrays) -> torch.Tensor:
        """Logits of the first rows; the rest of the batch is padding again."""
        *given, table = arrays
        count, width = table.shape
        whole = [np.concatenate([some, fill[len(some) :]]) for some, fill in zip(given, self._padding, strict=True)]
        self._fixed.copy_(_packed(whole, self._fixed.device), non_blocking=True)
        placed = _packed([table], self._tables.device).to(self._tables.device, non_blocking=True)
        self._tables[:count, :width] = _unpacked(placed, [table])[0]
        self._tables[count:, 0] = self._nobody
        self._replay()
        return self._logits[:count]


def _packed(arrays: Arrays, device: torch.device) -> torch.Tensor:
    """Their bytes, each at a multiple of ``ALIGNED_BYTES``, where one copy takes them to ``device``.

    A kernel is compiled anew for a pointer that is not aligned as the last one was.
    """
    sizes = [_aligned(array.nbytes) for array in arrays]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for piece, array in zip(packed.split(sizes), arrays, strict=True):
        piece.numpy()[: array.nbytes] = array.reshape(-1).view(np.uint8)
    return packed


def _unpacked(packed: torch.Tensor, like: Arrays) -> list[torch.Tensor]:
    """Views of the packed arrays."""
    pieces = packed.split([_aligned(array.nbytes) for array in like])
    return [
        piece[: array.nbytes].view(torch.int64 if array.dtype == np.int64 else torch.int32).view(array.shape)
        for piece, array in zip(pieces, like, strict=True)
    ]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED_BYTES) * ALIGNED_BYTES


def _placed(arrays: Arrays, device: torch.device) -> _Inputs:
    return _Inputs._make(_unpacked(_packed(arrays, device).to(device, non_blocking=True), arrays))


def cuda_capture() -> Capture:
    """Captures in CUDA graphs that share one memory pool. To be used while nothing else runs on the device."""
    shared = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        # Once before, on a stream of its own: kernels are compiled and workspaces allocated outside of the graph.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=shared):
            result = run()
        return graph.replay, result

    return capture
