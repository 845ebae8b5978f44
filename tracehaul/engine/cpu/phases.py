"""What the kernels share: a model's sizes, an iteration's memory, and how threads pass through a phase together."""

# numba types these functions, from their arguments.
# pyright: basic

from typing import NamedTuple

import numpy as np
from numba import types

from tracehaul.engine.cpu.compiling import TILING, inner
from tracehaul.engine.cpu.vectors import LANES, claim, peek

SPAN_TOKENS = 512
"""Attention sums over runs of this many keys, then merges the runs in order: short segments' in parallel."""
SPLIT_TOKENS_MAX = 16
"""Segments up to this long have one task a span; longer ones one a query block."""
QUERY_TOKENS = 32
"""Query block of a longer segment."""
KEY_TOKENS = 128
"""Keys brought into multiplying order at a time."""
ROW_BLOCK = 32 if TILING.pairs else 48
"""Rows that are multiplied with one reading of weights; those that are widened to float32 want more of them."""
OUTPUT_BLOCK = 64
NARROW_BLOCK = 32
HEAD_BLOCK = 256
PHASE_BYTES = 128
LINE_BYTES = 64
CELL_BYTES = 4 * LANES
"""Partial sums of two rows' product: see :mod:`tracehaul.engine.cpu.panels`."""
PANEL_STEPS = 576
"""Numbers of each row that are widened at a time: with as many of some other rows they fill half of 32 KiB."""
PANEL_OUTPUTS = 8
PANEL_BYTES = 4 * PANEL_OUTPUTS * PANEL_STEPS
LAYER_PHASES = 7
OUTER_PHASES = 3

FULL = np.float32(0)
LOWEST = np.float32(-1e30)
LOG2_E = np.float32(1.4426950408889634)
_SPINS = 2000
"""Looks at a counter before the core is offered to others."""

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


class Shape(NamedTuple):
    """A model: its sizes, and where what all layers share lies."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    embedding: int
    embedding_scales: int
    """Of int8 rows, as those of all matrices: float32, one for each row; otherwise unused."""
    norm: int
    head: int
    head_scales: int
    cos: int
    """float32 ``[context_max, head_dim / 2]``, as ``sin``."""
    sin: int
    panel: int
    """Where in a thread's scratch memory its panel is: see :func:`panel_bytes`."""


class Buffers(NamedTuple):
    """An iteration's memory, shared by its threads."""

    pool: int
    """``[layers, 2, kv_heads, pool_tokens, head_dim]``."""
    pool_tokens: int
    hidden: int
    normed: int
    queries: int
    attended: int
    activated: int
    partials: int
    """Results of spans: see :func:`partial_floats`."""
    logits: int
    cut: int
    """An integer: no layer is begun where it is not 0."""
    sync: int
    """Zeroed counters: ``PHASE_BYTES`` for each phase, then 8 bytes for each segment's KV head."""


def partial_floats(shape: Shape) -> int:
    """float32 of one span's result for one KV head: each row's largest score, sum and weighted values."""
    return SPLIT_TOKENS_MAX * (shape.heads // shape.kv_heads) * (shape.head_dim + 2)


def work_bytes(heads: int, kv_heads: int, head_dim: int) -> int:
    """Memory of its own in which each thread computes; before its panel of weights."""
    rows = QUERY_TOKENS * (heads // kv_heads)
    attention = 3 * rows * (head_dim + 2) + 12 * KEY_TOKENS + 2 * KEY_TOKENS * head_dim
    return 4 * max(attention, 2 * ROW_BLOCK * max(OUTPUT_BLOCK, head_dim)) + 4096


def panel_bytes(shape: Shape) -> int:
    """Room for weights as what they are multiplied with: of int8 a vector's lanes of the longest rows."""
    if not TILING.pairs:
        return PANEL_BYTES + ROW_BLOCK * LANES * CELL_BYTES
    return 4 * LANES * max(shape.hidden, shape.intermediate, shape.heads * shape.head_dim)


@inner
def finish(sync: int, phase: int, mine: int, tasks: int) -> None:
    """Say that ``mine`` tasks are done and wait for all."""
    done = sync + phase * PHASE_BYTES + PHASE_BYTES // 2
    claim(done, mine)
    looks = 0
    while peek(done) < tasks:
        looks += 1
        if looks > _SPINS:
            _sched_yield()
