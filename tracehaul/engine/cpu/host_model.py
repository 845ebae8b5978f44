"""The forward pass on the CPU by compiled kernels: memory, addresses and threads around :mod:`.kernels`."""

import mmap
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tracehaul.engine.base import CutShort
from tracehaul.engine.cpu import kernels, phases
from tracehaul.engine.cpu.attending import plan_attention
from tracehaul.engine.cpu.compiling import TILING
from tracehaul.engine.cpu.phases import Buffers, Shape
from tracehaul.engine.cpu.team import Team
from tracehaul.engine.cpu.vectors import LANES
from tracehaul.engine.model import Segment
from tracehaul.engine.rope import rope_tables
from tracehaul.engine.weights import LayerWeights, Weights
from tracehaul.model.model_config import ModelConfig
from tracehaul.runtime.log import Log

log = Log(__name__)

_KINDS = {torch.bfloat16: np.uint16(0), torch.float32: np.float32(0)}
_KEPT_LOGITS = 64
"""Rows whose memory is kept for the next iteration: more are scores of a prompt, which come and go."""


def is_supported(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether the kernels run this model: whole vectors in every row, and numbers that they know."""
    widths = (config.hidden, config.head_dim, config.intermediate)
    return (
        dtype in _KINDS
        and all(width % 32 == 0 for width in widths)
        and config.vocab_size >= LANES
        and all(kind.window is None for kind in config.kinds)
    )


class HostModel:
    """Weights, tables and an iteration's memory. Used from one thread, with helpers of its own."""

    def __init__(self, weights: Weights, threads: int) -> None:
        c, dtype = weights.config, weights.dtype
        assert is_supported(c, dtype)
        self._dtype = dtype
        self._like = _KINDS[dtype]
        self._kind = self._like if weights.embedding_scales is None else np.int8(0)
        self._cos, self._sin = rope_tables(c, torch.float32, torch.device("cpu"))
        self._weights = weights
        self._shape = Shape(
            layers=c.layers,
            hidden=c.hidden,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            intermediate=c.intermediate,
            vocab=c.vocab_size,
            eps=c.norm_eps,
            embedding=weights.embedding.data_ptr(),
            embedding_scales=_address(weights.embedding_scales),
            norm=weights.norm.data_ptr(),
            head=weights.head.data_ptr(),
            head_scales=_address(weights.head_scales),
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            panel=phases.work_bytes(c.heads, c.kv_heads, c.head_dim),
        )
        self._layers = np.array([_addresses(layer) for layer in weights.layers], np.int64)
        self._team = Team(threads, self._shape.panel + phases.panel_bytes(self._shape))
        self._rows = _Rows(self._shape, dtype, 0)
        self._partials = _pages(0)
        self._logits = torch.empty(0, c.vocab_size)
        self._tasks = np.empty((0, 5), np.int64)
        log.info("kernels", products=TILING.words, threads=threads)
        self._arguments: tuple[object, ...] = ()
        self._cut = np.zeros(1, np.int64)

    def forward(
        self, tokens: Sequence[int], segments: Sequence[Segment], pool: torch.Tensor, sampled_rows: Sequence[int]
    ) -> torch.Tensor:
        """Append every segment's tokens to its KV; float32 logits ``[len(sampled_rows), vocab]`` of those rows, until
        the next call.

        A row's logits do not depend on what else is in the iteration, nor on how its sequence was cut into chunks.

        Raises:
            IndexError: a token is outside the vocabulary.
            CutShort: see :meth:`cut`.
        """
        self._team.settle()
        count, shape = len(tokens), self._shape
        if not 0 <= min(tokens) <= max(tokens) < shape.vocab:
            raise IndexError("a token outside the vocabulary")
        if count > self._rows.count:
            self._rows = _Rows(shape, self._dtype, count)
        table = np.array(segments, np.int64)
        positions = np.concatenate([np.arange(s.past, s.past + s.tokens) for s in segments])
        slots = positions + np.repeat(table[:, 2], table[:, 1])
        spans = self._plan(table)
        cut = self._cut = np.zeros(1, np.int64)
        sync = np.zeros(_sync_bytes(shape, len(segments)) // 8, np.int64)
        logits = self._logits_of(len(sampled_rows))
        buffers = Buffers(
            pool=pool.data_ptr(),
            pool_tokens=pool.shape[3],
            partials=self._partials.ctypes.data,
            logits=logits.data_ptr(),
            cut=cut.ctypes.data,
            sync=sync.ctypes.data,
            **self._rows.addresses(),
        )
        arguments = (
            shape,
            self._layers,
            buffers,
            np.array(tokens, np.int64),
            positions,
            slots,
            table,
            self._tasks,
            spans,
            np.array(sampled_rows, np.int64),
        )
        # Late helpers still look at them after this returns.
        self._arguments = (*arguments, sync, cut)
        if not self._team.run(lambda scratch: kernels.forward(*arguments, scratch, self._like, self._kind)):
            self._arguments = (*self._arguments, logits)
            raise CutShort
        return logits

    def cut(self) -> None:
        """The forward pass under way, if any, ends at its next layer. From any thread."""
        self._cut[0] = 1

    def close(self) -> None:
        """End the helper threads."""
        self._team.close()

    def _logits_of(self, rows: int) -> torch.Tensor:
        """Memory for them."""
        if rows <= len(self._logits):
            return self._logits[:rows]
        vocab = self._shape.vocab
        room = max(rows, _KEPT_LOGITS)
        logits = torch.from_numpy(_pages(room * vocab * 4).view(np.float32)).view(room, vocab)
        if room == _KEPT_LOGITS:
            self._logits = logits
        return logits[:rows]

    def _plan(self, segments: np.ndarray) -> int:
        """Lay out the attention's tasks and the memory of their results."""
        tokens, past = segments[:, 1], segments[:, 3]
        spans = int(np.sum(-(-(tokens + past) // phases.SPAN_TOKENS), where=tokens <= phases.SPLIT_TOKENS_MAX))
        tasks = spans + int(np.sum(-(-tokens // phases.QUERY_TOKENS)))
        if len(self._tasks) < tasks:
            self._tasks = np.empty((2 * tasks, 5), np.int64)
        floats = spans * self._shape.kv_heads * phases.partial_floats(self._shape)
        if len(self._partials) < 4 * floats:
            self._partials = _pages(2 * 4 * floats)
        return plan_attention(segments, self._tasks)


class _Rows:
    """Activations of up to ``count`` rows, kept from one iteration to the next."""

    def __init__(self, shape: Shape, dtype: torch.dtype, count: int) -> None:
        self.count = count
        width = shape.heads * shape.head_dim
        held_bytes = dtype.itemsize if TILING.pairs else 4  # as what products read
        self._parts = {
            "hidden": _pages(count * shape.hidden * 4),
            "normed": _pages(count * shape.hidden * held_bytes),
            "queries": _pages(count * width * held_bytes),
            "attended": _pages(count * width * held_bytes),
            "activated": _pages(count * shape.intermediate * held_bytes),
        }

    def addresses(self) -> dict[str, int]:
        """By the names of :class:`Buffers`."""
        return {name: part.ctypes.data for name, part in self._parts.items()}


def _pages(nbytes: int) -> NDArray[np.uint8]:
    """Memory that is taken as it is touched, and goes back to the system with its last user.

    The heap would keep it, and find it too small for what outgrew it.
    """
    memory = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8)


def _addresses(layer: LayerWeights) -> list[int]:
    return [_address(getattr(layer, name)) for name in kernels.LAYER_PARTS] + [int(layer.rope)]


def _address(part: torch.Tensor | None) -> int:
    return 0 if part is None else part.data_ptr()


def _sync_bytes(shape: Shape, segments: int) -> int:
    count = phases.LAYER_PHASES * shape.layers + phases.OUTER_PHASES
    return count * phases.PHASE_BYTES + segments * shape.kv_heads * 8
