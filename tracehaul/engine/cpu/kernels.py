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
from tracehaul.engine.cpu.linear import product
from tracehaul.engine.cpu.phases import (
    FULL,
    HEAD_BLOCK,
    LAYER_PHASES,
    LOG2_E,
    NARROW_BLOCK,
    OUTPUT_BLOCK,
    PHASE_BYTES,
    ROW_BLOCK,
    Buffers,
    Shape,
    finish,
)
from tracehaul.engine.cpu.vectors import (
    LANES,
    add,
    claim,
    div,
    exp2,
    fma,
    load,
    load_one,
    mul,
    operand,
    peek,
    settle,
    size_of,
    splat,
    store,
    sub,
    total,
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
def normalize(source: int, weight: int, size: int, eps: float, target: int, like: Any, held: Any) -> None:
    """One row's root mean square norm, from float32, rounded to ``like``; ``target`` may be ``source``."""
    squares = splat(np.float32(0))
    for at in range(0, size * 4, LANES * 4):
        value = load(source + at, FULL)
        squares = fma(value, value, squares)
    scale = splat(np.float32(1.0 / np.sqrt(total(squares) / size + eps)))
    for at in range(0, size, LANES):
        value = mul(mul(load(source + at * 4, FULL), scale), load(weight + at * 4, FULL))
        store(target + at * size_of(held), settle(value, like, held), held)


@inner
def normalize_phase(shape: Shape, b: Buffers, rows: Any, count: int, weight: int, phase: int, like: Any) -> None:
    """Norm of the hidden rows that ``rows`` names, or of the first ``count`` where it names none."""
    tasks, held = (count + 7) // 8, operand(like)
    mine = 0
    while True:
        task = claim(b.sync + phase * PHASE_BYTES, 1)
        if task >= tasks:
            break
        for row in range(task * 8, min(task * 8 + 8, count)):
            source = rows[row] if len(rows) > 0 else row
            target = b.normed + row * shape.hidden * size_of(held)
            normalize(b.hidden + source * shape.hidden * 4, weight, shape.hidden, shape.eps, target, like, held)
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
def rotate(shape: Shape, head: int, position: int, target: int, like: Any, held: Any) -> None:
    """Rotary embedding of one head's float32 at ``head``, rounded to ``like``."""
    half = shape.head_dim // 2
    for at in range(0, half, LANES):
        cos = load(shape.cos + (position * half + at) * 4, FULL)
        sin = load(shape.sin + (position * half + at) * 4, FULL)
        first, second = load(head + at * 4, FULL), load(head + (half + at) * 4, FULL)
        turned = settle(sub(mul(first, cos), mul(second, sin)), like, held)
        store(target + at * size_of(held), turned, held)
        turned = settle(add(mul(second, cos), mul(first, sin)), like, held)
        store(target + (half + at) * size_of(held), turned, held)


@inner
def place(shape: Shape, head: int, turns: int, position: int, target: int, like: Any, held: Any) -> None:
    """One head's float32, rotated if it ``turns``, rounded to ``like`` and kept as ``held``."""
    if turns != 0:
        rotate(shape, head, position, target, like, held)
        return
    for at in range(0, shape.head_dim, LANES):
        store(target + at * size_of(held), settle(load(head + at * 4, FULL), like, held), held)


@inner
def qkv_phase(
    shape: Shape, b: Buffers, layer: Any, index: int, positions: Any, slots: Any,
    scratch: int, phase: int, like: Any, kind: Any,
) -> None:  # fmt: skip
    """Queries, rotated; keys, rotated, and values into the pool. A task is one head of a block of rows."""
    count, held = len(positions), operand(like)
    heads = shape.heads + 2 * shape.kv_heads
    blocks = (count + ROW_BLOCK - 1) // ROW_BLOCK
    head_bytes, stride = shape.head_dim * size_of(like), shape.head_dim * 4
    mine = 0
    while True:
        task = claim(b.sync + phase * PHASE_BYTES, 1)
        if task >= heads * blocks:
            break
        head, first = task // blocks, task % blocks * ROW_BLOCK
        rows = min(ROW_BLOCK, count - first)
        w = layer[_QKV] + head * shape.head_dim * shape.hidden * size_of(kind)
        scales = layer[_QKV_SCALES] + head * stride
        x_stride = shape.hidden * size_of(held)
        product(
            w, scales, b.normed + first * x_stride, x_stride, rows, shape.head_dim, shape.hidden,
            scratch, stride, scratch + shape.panel, like, kind,
        )  # fmt: skip
        norm = layer[_Q_NORM] if head < shape.heads else layer[_K_NORM]
        kv = head - shape.heads  # key heads, then value heads, as in the pool
        plane = b.pool + (index * 2 * shape.kv_heads + kv) * b.pool_tokens * head_bytes
        for row in range(rows):
            source = scratch + row * stride
            if layer[_QKV_BIAS] != 0:
                add_bias(source, layer[_QKV_BIAS] + head * head_bytes, shape.head_dim, like)
            position, into = positions[first + row], plane + slots[first + row] * head_bytes
            if kv >= shape.kv_heads:
                place(shape, source, 0, position, into, like, like)
                continue
            if norm != 0:
                normalize(source, norm, shape.head_dim, shape.eps, source, FULL, FULL)
            if kv >= 0:
                place(shape, source, layer[_ROPE], position, into, like, like)
            else:
                into = b.queries + ((first + row) * shape.heads + head) * shape.head_dim * size_of(held)
                place(shape, source, layer[_ROPE], position, into, like, held)
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
    x_stride = length * size_of(operand(like))
    mine = 0
    while True:
        task = claim(b.sync + phase * PHASE_BYTES, 1)
        if task >= tasks:
            break
        n, first = task // blocks * NARROW_BLOCK, task % blocks * ROW_BLOCK
        rows, outputs = min(ROW_BLOCK, count - first), min(NARROW_BLOCK, shape.hidden - n)
        product(
            w + n * length * size_of(kind), scales + n * 4, x + first * x_stride, x_stride, rows, outputs, length,
            scratch, NARROW_BLOCK * 4, scratch + shape.panel, like, kind,
        )  # fmt: skip
        for row in range(rows):
            target, piece = b.hidden + ((first + row) * shape.hidden + n) * 4, scratch + row * NARROW_BLOCK * 4
            if bias != 0:
                add_bias(piece, bias + n * size_of(like), outputs, like)
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
    held, length, stride = operand(like), shape.hidden, OUTPUT_BLOCK * 4
    size, x_stride = size_of(held), shape.hidden * size_of(held)
    ups = scratch + ROW_BLOCK * stride
    one, steep = splat(np.float32(1)), splat(-LOG2_E)
    mine = 0
    while True:
        task = claim(b.sync + phase * PHASE_BYTES, 1)
        if task >= tasks:
            break
        n, first = task // blocks * OUTPUT_BLOCK, task % blocks * ROW_BLOCK
        rows, outputs = min(ROW_BLOCK, count - first), min(OUTPUT_BLOCK, shape.intermediate - n)
        x = b.normed + first * x_stride
        for part, out in ((n, scratch), (shape.intermediate + n, ups)):
            product(
                w + part * length * size_of(kind), scales + part * 4, x, x_stride, rows, outputs, length,
                out, stride, scratch + shape.panel, like, kind,
            )  # fmt: skip
        for row in range(rows):
            target = b.activated + ((first + row) * shape.intermediate + n) * size
            if bias != 0:
                add_bias(scratch + row * stride, bias + n * size_of(like), outputs, like)
                add_bias(ups + row * stride, bias + (shape.intermediate + n) * size_of(like), outputs, like)
            for at in range(0, outputs, LANES):
                gate = load(scratch + row * stride + at * 4, FULL)
                gate = div(gate, add(one, exp2(mul(gate, steep))))
                value = mul(gate, load(ups + row * stride + at * 4, FULL))
                store(target + at * size, settle(value, like, held), held)
        mine += 1
    finish(b.sync, phase, mine, tasks)


@inner
def head_phase(shape: Shape, b: Buffers, count: int, scratch: int, phase: int, like: Any, kind: Any) -> None:
    """Logits of the normed rows."""
    blocks = (count + ROW_BLOCK - 1) // ROW_BLOCK
    # The last part is longer by what is too little for one of its own: no two threads write the same logits.
    parts = (shape.vocab + HEAD_BLOCK - LANES) // HEAD_BLOCK
    tasks = parts * blocks
    x_stride, stride = shape.hidden * size_of(operand(like)), shape.vocab * 4
    mine = 0
    while True:
        task = claim(b.sync + phase * PHASE_BYTES, 1)
        if task >= tasks:
            break
        first, part = task % blocks * ROW_BLOCK, task // blocks
        n, rows = part * HEAD_BLOCK, min(ROW_BLOCK, count - first)
        outputs = shape.vocab - n if part == parts - 1 else HEAD_BLOCK
        w, x = shape.head + n * shape.hidden * size_of(kind), b.normed + first * x_stride
        target = b.logits + first * stride + n * 4
        product(
            w, shape.head_scales + n * 4, x, x_stride, rows, outputs, shape.hidden,
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
) -> bool:
    """Append every segment's tokens to its KV, and leave logits of the ``sampled`` rows. Called by every thread: False
    where it was cut short."""
    count, everything = len(tokens), sampled[:0]
    embed_phase(shape, b, tokens, 0, kind)
    for index in range(shape.layers):
        if peek(b.cut) != 0:
            return False  # threads need not agree: each phase's work is whoever's that is there
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
    return True
