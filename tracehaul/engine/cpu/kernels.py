"""The forward pass of an iteration as one compiled function that several threads run together.

An iteration is a row of *phases*. Threads claim a phase's tasks one by one and wait at its end for those still being
computed, so a thread that the system keeps off its core is not waited for unless it holds a task, and one that comes
late finds the rest. A row's result depends on that row alone: on no other row of the batch, not on how a prompt was
cut into chunks, not on the number of threads. Every sum runs in one order whatever shares the iteration.

Addresses are integers; ``like`` says what activations and KV hold, ``kind`` what weights do: the same, or int8 with a
scale for each row (see :mod:`tracehaul.engine.cpu.vectors`). Sums, norms, residuals and softmax are float32.
"""

# numba types these functions, from their arguments.
# pyright: basic

from typing import Any

import numpy as np

from tracehaul.engine.cpu.attending import attend_phase
from tracehaul.engine.cpu.compiling import compiled, inner
from tracehaul.engine.cpu.phases import (
    FULL,
    HEAD_BLOCK,
    LAYER_PHASES,
    LINE_BYTES,
    LOG2_E,
    NARROW_BLOCK,
    OUTPUT_BLOCK,
    PHASE_BYTES,
    ROW_BLOCK,
    Buffers,
    Shape,
    finish,
)
from tracehaul.engine.cpu.products import (
    dot_4x4,
    dot_8x2,
    dot_16x1,
    store_2x8,
    store_4x4,
)
from tracehaul.engine.cpu.vectors import (
    LANES,
    add,
    claim,
    div,
    exp2,
    expect,
    fma,
    load,
    load_one,
    mul,
    size_of,
    splat,
    store,
    sub,
    total,
    widen,
)

LAYER_PARTS = (
    "attention_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "out_bias",
    "mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias",
    "qkv_scales", "out_scales", "gate_up_scales", "down_scales",
)  # fmt: skip
"""Columns of the layer table: addresses, 0 for what a model has not. One more says whether positions count."""
(
    _ATTENTION_NORM, _QKV, _QKV_BIAS, _Q_NORM, _K_NORM, _OUT, _OUT_BIAS,
    _MLP_NORM, _GATE_UP, _GATE_UP_BIAS, _DOWN, _DOWN_BIAS,
    _QKV_SCALES, _OUT_SCALES, _GATE_UP_SCALES, _DOWN_SCALES, _ROPE,
) = range(17)  # fmt: skip


@inner
def unpack_run(source: int, count: int, target: int, like: Any) -> None:
    """A run of int8 weights into the panel; the next run is expected meanwhile."""
    for at in range(0, count, 2 * LANES):
        expect(source + count + at)
        widen(source + at, target + at * size_of(like), like)


@inner
def scale_run(column: int, stride: int, rows: int, scales: int) -> None:
    """A run of sums, each by its weights' scale."""
    factors = load(scales, FULL)
    for row in range(rows):
        store(column + row * stride, mul(load(column + row * stride, FULL), factors), FULL)


@inner
def product(
    w: int, scales: int, x: int, x_stride: int, rows: int, outputs: int, length: int,
    out: int, out_stride: int, panel: int, like: Any, kind: Any,
) -> None:  # fmt: skip
    """``out[row, n] = x[row] . w[n]``, float32; at least 16 outputs."""
    w_stride = length * size_of(like)
    for start in range(0, outputs, LANES):
        # The last run of a number that 16 does not divide begins earlier, and computes some again.
        n = min(start, outputs - LANES)
        run, column = w + n * length * size_of(kind), out + n * 4
        if size_of(kind) == 1:
            unpack_run(run, LANES * length, panel, like)
            run = panel
        paired = rows // 4 * 4
        # Rows inside: four rows of weights stay in the nearest cache while all rows are multiplied by them.
        for part in range(0, LANES, 4):
            w_part, cell = run + part * w_stride, column + part * 4
            if 0 < paired <= LANES and size_of(kind) > 1:
                # The next four come while these are computed; what lies past the last is not touched, only expected.
                # More rows find theirs in a cache: another block of rows was there before.
                for at in range(4 * w_stride, 8 * w_stride, LINE_BYTES):
                    expect(w_part + at)
            for row in range(0, paired, 4):
                sums = dot_4x4(w_part, w_stride, x + row * x_stride, x_stride, length, like)
                store_4x4(cell + row * out_stride, out_stride, sums)
        if rows - paired >= 2:
            x_row, cell = x + paired * x_stride, column + paired * out_stride
            for part in range(0, LANES, 8):
                sums = dot_8x2(run + part * w_stride, w_stride, x_row, x_stride, length, like)
                store_2x8(cell + part * 4, out_stride, sums)
            paired += 2
        if paired < rows:
            sums = dot_16x1(run, w_stride, x + paired * x_stride, x_stride, length, like)
            store(column + paired * out_stride, sums, FULL)
        if size_of(kind) == 1:
            scale_run(column, out_stride, rows, scales + n * 4)


@inner
def normalize(source: int, weight: int, size: int, eps: float, target: int, like: Any) -> None:
    """One row's root mean square norm, from float32; ``target`` may be ``source``."""
    squares = splat(np.float32(0))
    for at in range(0, size * 4, LANES * 4):
        value = load(source + at, FULL)
        squares = fma(value, value, squares)
    scale = splat(np.float32(1.0 / np.sqrt(total(squares) / size + eps)))
    for at in range(0, size, LANES):
        value = mul(mul(load(source + at * 4, FULL), scale), load(weight + at * 4, FULL))
        store(target + at * size_of(like), value, like)


@inner
def normalize_phase(shape: Shape, b: Buffers, rows: Any, count: int, weight: int, phase: int, like: Any) -> None:
    """Norm of the hidden rows that ``rows`` names, or of the first ``count`` where it names none."""
    tasks = (count + 7) // 8
    mine = 0
    while True:
        task = claim(b.sync + phase * PHASE_BYTES, 1)
        if task >= tasks:
            break
        for row in range(task * 8, min(task * 8 + 8, count)):
            source = rows[row] if len(rows) > 0 else row
            target = b.normed + row * shape.hidden * size_of(like)
            normalize(b.hidden + source * shape.hidden * 4, weight, shape.hidden, shape.eps, target, like)
        mine += 1
    finish(b.sync, phase, mine, tasks)


@inner
def embed_phase(shape: Shape, b: Buffers, tokens: Any, phase: int, kind: Any) -> None:
    """Embeddings as float32."""
    tasks = (len(tokens) + 31) // 32
    mine = 0
    while True:
        task = claim(b.sync + phase * PHASE_BYTES, 1)
        if task >= tasks:
            break
        for row in range(task * 32, min(task * 32 + 32, len(tokens))):
            source = shape.embedding + tokens[row] * shape.hidden * size_of(kind)
            target = b.hidden + row * shape.hidden * 4
            for at in range(0, shape.hidden, LANES):
                store(target + at * 4, load(source + at * size_of(kind), kind), FULL)
            if size_of(kind) == 1:
                scale = splat(load_one(shape.embedding_scales + tokens[row] * 4))
                for at in range(target, target + shape.hidden * 4, LANES * 4):
                    store(at, mul(load(at, FULL), scale), FULL)
        mine += 1
    finish(b.sync, phase, mine, tasks)


@inner
def add_bias(row: int, bias: int, size: int, like: Any) -> None:
    """A linear layer's bias onto one row of its float32 output."""
    for at in range(0, size, LANES):
        store(row + at * 4, add(load(row + at * 4, FULL), load(bias + at * size_of(like), like)), FULL)


@inner
def rotate(shape: Shape, head: int, position: int, target: int, like: Any) -> None:
    """Rotary embedding of one head's float32 at ``head``."""
    half = shape.head_dim // 2
    for at in range(0, half, LANES):
        cos = load(shape.cos + (position * half + at) * 4, FULL)
        sin = load(shape.sin + (position * half + at) * 4, FULL)
        first, second = load(head + at * 4, FULL), load(head + (half + at) * 4, FULL)
        store(target + at * size_of(like), sub(mul(first, cos), mul(second, sin)), like)
        store(target + (half + at) * size_of(like), add(mul(second, cos), mul(first, sin)), like)


@inner
def qkv_phase(
    shape: Shape, b: Buffers, layer: Any, index: int, positions: Any, slots: Any,
    scratch: int, phase: int, like: Any, kind: Any,
) -> None:  # fmt: skip
    """Queries, rotated; keys, rotated, and values into the pool. A task is one head of a block of rows."""
    count, size = len(positions), size_of(like)
    heads = shape.heads + 2 * shape.kv_heads
    blocks = (count + ROW_BLOCK - 1) // ROW_BLOCK
    head_bytes, stride = shape.head_dim * size, shape.head_dim * 4
    mine = 0
    while True:
        task = claim(b.sync + phase * PHASE_BYTES, 1)
        if task >= heads * blocks:
            break
        head, first = task // blocks, task % blocks * ROW_BLOCK
        rows = min(ROW_BLOCK, count - first)
        w = layer[_QKV] + head * shape.head_dim * shape.hidden * size_of(kind)
        scales = layer[_QKV_SCALES] + head * stride
        x = b.normed + first * shape.hidden * size
        product(
            w, scales, x, shape.hidden * size, rows, shape.head_dim, shape.hidden,
            scratch, stride, scratch + shape.panel, like, kind,
        )  # fmt: skip
        norm = layer[_Q_NORM] if head < shape.heads else layer[_K_NORM]
        kv = head - shape.heads  # key heads, then value heads, as in the pool
        plane = b.pool + (index * 2 * shape.kv_heads + kv) * b.pool_tokens * head_bytes
        for row in range(rows):
            source = scratch + row * stride
            if layer[_QKV_BIAS] != 0:
                add_bias(source, layer[_QKV_BIAS] + head * head_bytes, shape.head_dim, like)
            if kv >= shape.kv_heads:
                target = plane + slots[first + row] * head_bytes
                for at in range(0, shape.head_dim, LANES):
                    store(target + at * size, load(source + at * 4, FULL), like)
                continue
            if norm != 0:
                normalize(source, norm, shape.head_dim, shape.eps, source, FULL)
            if kv >= 0:
                target = plane + slots[first + row] * head_bytes
            else:
                target = b.queries + ((first + row) * shape.heads + head) * head_bytes
            if layer[_ROPE] != 0:
                rotate(shape, source, positions[first + row], target, like)
            else:
                for at in range(0, shape.head_dim, LANES):
                    store(target + at * size, load(source + at * 4, FULL), like)
        mine += 1
    finish(b.sync, phase, mine, heads * blocks)


@inner
def add_phase(
    shape: Shape, b: Buffers, w: int, scales: int, bias: int, x: int, length: int, count: int,
    scratch: int, phase: int, like: Any, kind: Any,
) -> None:  # fmt: skip
    """A linear layer's output added to the hidden rows."""
    blocks = (count + ROW_BLOCK - 1) // ROW_BLOCK
    tasks = (shape.hidden + NARROW_BLOCK - 1) // NARROW_BLOCK * blocks
    size = size_of(like)
    mine = 0
    while True:
        task = claim(b.sync + phase * PHASE_BYTES, 1)
        if task >= tasks:
            break
        n, first = task // blocks * NARROW_BLOCK, task % blocks * ROW_BLOCK
        rows, outputs = min(ROW_BLOCK, count - first), min(NARROW_BLOCK, shape.hidden - n)
        source = x + first * length * size
        product(
            w + n * length * size_of(kind), scales + n * 4, source, length * size, rows, outputs, length,
            scratch, NARROW_BLOCK * 4, scratch + shape.panel, like, kind,
        )  # fmt: skip
        for row in range(rows):
            target, piece = b.hidden + ((first + row) * shape.hidden + n) * 4, scratch + row * NARROW_BLOCK * 4
            if bias != 0:
                add_bias(piece, bias + n * size, outputs, like)
            for at in range(0, outputs * 4, LANES * 4):
                store(target + at, add(load(target + at, FULL), load(piece + at, FULL)), FULL)
        mine += 1
    finish(b.sync, phase, mine, tasks)


@inner
def gate_phase(
    shape: Shape, b: Buffers, w: int, scales: int, bias: int, count: int,
    scratch: int, phase: int, like: Any, kind: Any,
) -> None:  # fmt: skip
    """``silu(gate) * up`` of the normed rows."""
    blocks = (count + ROW_BLOCK - 1) // ROW_BLOCK
    tasks = (shape.intermediate + OUTPUT_BLOCK - 1) // OUTPUT_BLOCK * blocks
    size, length, stride = size_of(like), shape.hidden, OUTPUT_BLOCK * 4
    ups = scratch + ROW_BLOCK * stride
    one, steep = splat(np.float32(1)), splat(-LOG2_E)
    mine = 0
    while True:
        task = claim(b.sync + phase * PHASE_BYTES, 1)
        if task >= tasks:
            break
        n, first = task // blocks * OUTPUT_BLOCK, task % blocks * ROW_BLOCK
        rows, outputs = min(ROW_BLOCK, count - first), min(OUTPUT_BLOCK, shape.intermediate - n)
        x = b.normed + first * length * size
        for part, out in ((n, scratch), (shape.intermediate + n, ups)):
            product(
                w + part * length * size_of(kind), scales + part * 4, x, length * size, rows, outputs, length,
                out, stride, scratch + shape.panel, like, kind,
            )  # fmt: skip
        for row in range(rows):
            target = b.activated + ((first + row) * shape.intermediate + n) * size
            if bias != 0:
                add_bias(scratch + row * stride, bias + n * size, outputs, like)
                add_bias(ups + row * stride, bias + (shape.intermediate + n) * size, outputs, like)
            for at in range(0, outputs, LANES):
                gate = load(scratch + row * stride + at * 4, FULL)
                gate = div(gate, add(one, exp2(mul(gate, steep))))
                store(target + at * size, mul(gate, load(ups + row * stride + at * 4, FULL)), like)
        mine += 1
    finish(b.sync, phase, mine, tasks)


@inner
def head_phase(shape: Shape, b: Buffers, count: int, scratch: int, phase: int, like: Any, kind: Any) -> None:
    """Logits of the normed rows."""
    blocks = (count + ROW_BLOCK - 1) // ROW_BLOCK
    # The last part is longer by what is too little for one of its own: no two threads write the same logits.
    parts = (shape.vocab + HEAD_BLOCK - LANES) // HEAD_BLOCK
    tasks = parts * blocks
    size, stride = size_of(like), shape.vocab * 4
    mine = 0
    while True:
        task = claim(b.sync + phase * PHASE_BYTES, 1)
        if task >= tasks:
            break
        first, part = task % blocks * ROW_BLOCK, task // blocks
        n, rows = part * HEAD_BLOCK, min(ROW_BLOCK, count - first)
        outputs = shape.vocab - n if part == parts - 1 else HEAD_BLOCK
        w, x = shape.head + n * shape.hidden * size_of(kind), b.normed + first * shape.hidden * size
        target = b.logits + first * stride + n * 4
        product(
            w, shape.head_scales + n * 4, x, shape.hidden * size, rows, outputs, shape.hidden,
            target, stride, scratch + shape.panel, like, kind,
        )  # fmt: skip
        mine += 1
    finish(b.sync, phase, mine, tasks)


# --- the whole ----------------------------------------------------------------------------------------------


@compiled
def forward(
    shape: Shape,
    layers: Any,
    b: Buffers,
    tokens: Any,
    positions: Any,
    slots: Any,
    segments: Any,
    tasks: Any,
    task_count: int,
    sampled: Any,
    scratch: int,
    like: Any,
    kind: Any,
) -> None:
    """Append every segment's tokens to its KV, and leave logits of the ``sampled`` rows. Called by every thread."""
    count, everything = len(tokens), sampled[:0]
    embed_phase(shape, b, tokens, 0, kind)
    for index in range(shape.layers):
        layer, phase = layers[index], 1 + LAYER_PHASES * index
        normalize_phase(shape, b, everything, count, layer[_ATTENTION_NORM], phase, like)
        qkv_phase(shape, b, layer, index, positions, slots, scratch, phase + 1, like, kind)
        attend_phase(shape, b, index, segments, tasks, task_count, scratch, phase + 2, like)
        width = shape.heads * shape.head_dim
        add_phase(
            shape, b, layer[_OUT], layer[_OUT_SCALES], layer[_OUT_BIAS], b.attended, width, count,
            scratch, phase + 3, like, kind,
        )  # fmt: skip
        normalize_phase(shape, b, everything, count, layer[_MLP_NORM], phase + 4, like)
        gate_phase(
            shape, b, layer[_GATE_UP], layer[_GATE_UP_SCALES], layer[_GATE_UP_BIAS], count,
            scratch, phase + 5, like, kind,
        )  # fmt: skip
        add_phase(
            shape, b, layer[_DOWN], layer[_DOWN_SCALES], layer[_DOWN_BIAS], b.activated, shape.intermediate, count,
            scratch, phase + 6, like, kind,
        )  # fmt: skip
    if len(sampled) > 0:
        phase = 1 + LAYER_PHASES * shape.layers
        normalize_phase(shape, b, sampled, len(sampled), shape.norm, phase, like)
        head_phase(shape, b, len(sampled), scratch, phase + 1, like, kind)
