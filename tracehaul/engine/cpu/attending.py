"""Attention of an iteration's new tokens over the KV pool, as phases of :mod:`tracehaul.engine.cpu.kernels`.

Keys and values are brought into the order that products want, a block at a time, and used for all of a query block's
rows. Softmax is kept up to date from block to block (arXiv:2205.14135); runs of keys are summed apart and merged in
order, so that a long context is the work of several threads.
"""

# numba types these functions, from their arguments.
# pyright: basic

from typing import Any

import numpy as np

from tracehaul.engine.cpu.compiling import compiled, inner
from tracehaul.engine.cpu.phases import (
    FULL,
    KEY_TOKENS,
    LAYER_PHASES,
    LINE_BYTES,
    LOG2_E,
    LOWEST,
    OUTER_PHASES,
    PHASE_BYTES,
    QUERY_TOKENS,
    SPAN_TOKENS,
    SPLIT_TOKENS_MAX,
    Buffers,
    Shape,
    finish,
)
from tracehaul.engine.cpu.products import (
    COLUMNS_1,
    COLUMNS_3,
    COLUMNS_6,
    gather_1,
    gather_3,
    gather_6,
    gather_narrow_1,
    interleave,
    scores_1,
    scores_3,
    scores_6,
    transpose,
)
from tracehaul.engine.cpu.vectors import (
    LANES,
    add,
    claim,
    div,
    exp2,
    expect,
    first_lanes,
    fma,
    larger,
    largest,
    load,
    load_one,
    mul,
    operand,
    settle,
    size_of,
    splat,
    store,
    store_one,
    sub,
    total,
)


@compiled
def plan_attention(segments: Any, tasks: Any) -> int:
    """Fill ``tasks`` with (segment, first query, queries, first key or -1 for all, first span's number); their count.

    ``segments`` has a row (row, tokens, base, past) for each.
    """
    count, spans_before = 0, 0
    for at in range(len(segments)):
        tokens, end = segments[at, 1], segments[at, 1] + segments[at, 3]
        if tokens <= SPLIT_TOKENS_MAX:
            for start in range(0, end, SPAN_TOKENS):
                tasks[count, 0], tasks[count, 1], tasks[count, 2] = at, 0, tokens
                tasks[count, 3], tasks[count, 4] = start, spans_before
                count += 1
            spans_before += (end + SPAN_TOKENS - 1) // SPAN_TOKENS
        else:
            # The later a block the longer its rows: those first, so that threads end together.
            for start in range((tokens - 1) // QUERY_TOKENS * QUERY_TOKENS, -1, -QUERY_TOKENS):
                tasks[count, 0], tasks[count, 1] = at, start
                tasks[count, 2] = min(QUERY_TOKENS, tokens - start)
                tasks[count, 3], tasks[count, 4] = -1, 0
                count += 1
    return count


@inner
def arrange_keys(source: int, tokens: int, head_dim: int, target: int, like: Any) -> None:
    """Keys ``[tokens, head_dim]`` into cells of 4 bytes ``[.., KEY_TOKENS]``; reads up to 15 keys further."""
    stride, cell = head_dim * size_of(like), 4 // size_of(operand(like)) * size_of(like)
    for token in range(0, tokens, LANES):
        for at in range(0, stride // cell, LANES):
            row = target + (at * KEY_TOKENS + token) * 4
            transpose(source + token * stride + at * cell, stride, row, KEY_TOKENS * 4, like)


@inner
def arrange_values(source: int, tokens: int, head_dim: int, target: int, like: Any) -> None:
    """Values into rows of cells, one for a token, or a pair of them in bfloat16."""
    stride = head_dim * size_of(like)
    if size_of(operand(like)) == 4:
        for at in range(0, tokens * head_dim, LANES):
            store(target + at * 4, load(source + at * size_of(like), like), FULL)
        return
    for token in range(0, tokens, 2):
        row = target + token * stride
        if token + 1 < tokens:
            for at in range(0, stride, LANES * 4):
                interleave(source + token * stride + at, source + (token + 1) * stride + at, row + 2 * at)
        else:
            # The token after the last weighs nothing, but nothing times whatever lies there might be no number.
            zeros = target + (token + 2) * stride
            for at in range(0, stride, LANES * 2):
                store(zeros + at, splat(np.float32(0)), like)
            for at in range(0, stride, LANES * 4):
                interleave(source + token * stride + at, zeros + at, row + 2 * at)


@inner
def expect_run(start: int, size: int) -> None:
    """A run of memory will be read soon."""
    for at in range(0, size, LINE_BYTES):
        expect(start + at)


@inner
def score(group: int, q: int, q_stride: int, keys: int, steps: int, out: int, held: Any) -> None:
    """Scores of 6, 3 or 1 rows with 64 keys."""
    stride = KEY_TOKENS * 4
    if group == 6:
        for at in range(0, 64 * 4, COLUMNS_6 * 4):
            scores_6(q, q_stride, keys + at, stride, steps, out + at, stride, held)
    elif group == 3:
        for at in range(0, 64 * 4, COLUMNS_3 * 4):
            scores_3(q, q_stride, keys + at, stride, steps, out + at, stride, held)
    else:
        for at in range(0, 64 * 4, COLUMNS_1 * 4):
            scores_1(q, q_stride, keys + at, stride, steps, out + at, stride, held)


@inner
def gather(group: int, p: int, values: int, steps: int, head_dim: int, out: int, held: Any) -> None:
    """Add the weighted values of 6, 3 or 1 rows to ``out``."""
    p_stride, stride = KEY_TOKENS * size_of(held), head_dim * 4
    columns = COLUMNS_6 if group == 6 else (COLUMNS_3 if group == 3 else COLUMNS_1)
    at = 0
    while at + columns <= head_dim:
        if group == 6:
            gather_6(p, p_stride, values + at * 4, stride, steps, out + at * 4, stride, held)
        elif group == 3:
            gather_3(p, p_stride, values + at * 4, stride, steps, out + at * 4, stride, held)
        else:
            gather_1(p, p_stride, values + at * 4, stride, steps, out + at * 4, stride, held)
        at += columns
    if at < head_dim:
        for row in range(group):
            gather_narrow_1(
                p + row * p_stride, p_stride, values + at * 4, stride, steps, out + row * stride + at * 4, stride, held
            )


@inner
def weigh(
    scores: int, tokens: int, visible: int, scale: float, state: int, out: int, head_dim: int, p: int, like: Any
) -> None:
    """One row's scores to weights ``p``; what was summed before is scaled to the new largest score.

    ``state`` is the row's largest score (in powers of two) and the sum of its weights. Keys from ``visible`` on do
    not count.
    """
    scales, lowest, none = splat(np.float32(scale)), splat(LOWEST), splat(np.float32(0))
    most = lowest
    for at in range(0, tokens, LANES):
        value = mul(load(scores + at * 4, FULL), scales)
        if at + LANES > visible:
            value = first_lanes(value, visible - at, lowest)
        store(scores + at * 4, value, FULL)
        most = larger(most, value)
    before = load_one(state)
    peak = max(before, largest(most))
    peaks, sums = splat(peak), none
    for at in range(0, tokens, LANES):
        value = exp2(sub(load(scores + at * 4, FULL), peaks))
        if at + LANES > visible:
            value = first_lanes(value, visible - at, none)
        sums = add(sums, value)
        store(p + at * size_of(like), value, like)
    shrink = exp2(splat(np.float32(before - peak)))
    store_one(state, peak)
    store_one(state + 4, np.float32(load_one(state + 4) * largest(shrink) + total(sums)))
    if before != peak:
        for at in range(0, head_dim * 4, LANES * 4):
            store(out + at, mul(load(out + at, FULL), shrink), FULL)


@inner
def attend_span(
    shape: Shape,
    q: int,
    rows: int,
    visible: int,
    keys: int,
    values: int,
    start: int,
    end: int,
    result: int,
    work: int,
    like: Any,
) -> None:
    """Attention of ``rows`` query rows over keys ``[start, end)``, into ``result``: states, then sums.

    Row ``r`` sees keys before ``visible + r // group``.
    """
    head_dim, group, held = shape.head_dim, shape.heads // shape.kv_heads, operand(like)
    head_bytes, q_bytes, size = head_dim * size_of(like), head_dim * size_of(held), size_of(held)
    sums = result + rows * 8
    for row in range(rows):
        store_one(result + row * 8, LOWEST)
        store_one(result + row * 8 + 4, np.float32(0))
    for at in range(0, rows * head_dim * 4, LANES * 4):
        store(sums + at, splat(np.float32(0)), FULL)
    scale = LOG2_E / np.sqrt(np.float32(head_dim))
    scores, p = work, work + 6 * KEY_TOKENS * 4
    own_keys = p + 6 * KEY_TOKENS * 4
    own_values = own_keys + KEY_TOKENS * q_bytes
    for first in range(start, end, KEY_TOKENS):
        tokens = min(KEY_TOKENS, end - first)
        block_keys, block_values = keys + first * head_bytes, values + first * head_bytes
        # What the next block needs comes while this one is computed, a little at a time.
        ahead = KEY_TOKENS * head_bytes if first + KEY_TOKENS < end else 0
        for token in range(0, tokens, LANES):
            some, at = min(LANES, tokens - token), token * head_bytes
            arrange_keys(block_keys + at, some, head_dim, own_keys + token * 4, like)
            if ahead > 0:
                expect_run(block_keys + ahead + at, LANES * head_bytes)
            elif first == start:
                expect_run(block_values + at, LANES * head_bytes)
        for token in range(0, tokens, LANES):
            some, at = min(LANES, tokens - token), token * head_bytes
            arrange_values(block_values + at, some, head_dim, own_values + token * q_bytes, like)
            if ahead > 0:
                expect_run(block_values + ahead + at, LANES * head_bytes // 2)
        steps = tokens if size == 4 else (tokens + 1) // 2
        row = 0
        while row < rows:
            together = 6 if row + 6 <= rows else (3 if row + 3 <= rows else 1)
            if visible + (row + together - 1) // group > first:
                for part in range(0, tokens, 64):
                    if ahead > 0 and row == 0:
                        for token in range(part, part + 64, LANES):
                            half = LANES * head_bytes // 2
                            expect_run(block_values + ahead + token * head_bytes + half, half)
                    score(
                        together,
                        q + row * q_bytes,
                        q_bytes,
                        own_keys + part * 4,
                        q_bytes // 4,
                        scores + part * 4,
                        held,
                    )
                for at in range(row, row + together):
                    weigh(
                        scores + (at - row) * KEY_TOKENS * 4,
                        tokens,
                        visible + at // group - first,
                        scale,
                        result + at * 8,
                        sums + at * head_dim * 4,
                        head_dim,
                        p + (at - row) * KEY_TOKENS * size,
                        held,
                    )
                gather(together, p, own_values, steps, head_dim, sums + row * head_dim * 4, held)
            row += together


@inner
def merge_span(rows: int, head_dim: int, into: int, more: int) -> None:
    """Add the result of the next span, row by row; rows that saw nothing of it stay as they are."""
    for row in range(rows):
        a, c = load_one(into + row * 8), load_one(more + row * 8)
        if c == LOWEST:
            continue
        peak = max(a, c)
        left, right = exp2(splat(np.float32(a - peak))), exp2(splat(np.float32(c - peak)))
        store_one(into + row * 8, peak)
        kept = load_one(into + row * 8 + 4) * largest(left)
        store_one(into + row * 8 + 4, np.float32(kept + load_one(more + row * 8 + 4) * largest(right)))
        for at in range(0, head_dim * 4, LANES * 4):
            place = rows * 8 + row * head_dim * 4 + at
            value = fma(load(more + place, FULL), right, mul(load(into + place, FULL), left))
            store(into + place, value, FULL)


@inner
def write_attended(shape: Shape, b: Buffers, result: int, first_row: int, rows: int, kv_head: int, like: Any) -> None:
    """The sums over the weights' sum, where the output layer reads them."""
    head_dim, group, held = shape.head_dim, shape.heads // shape.kv_heads, operand(like)
    for row in range(rows):
        share = splat(load_one(result + row * 8 + 4))
        head = (first_row + row // group) * shape.heads + kv_head * group + row % group
        target = b.attended + head * head_dim * size_of(held)
        for at in range(0, head_dim, LANES):
            value = div(load(result + rows * 8 + (row * head_dim + at) * 4, FULL), share)
            store(target + at * size_of(held), settle(value, like, held), held)


@inner
def attend_phase(
    shape: Shape, b: Buffers, index: int, segments: Any, tasks: Any, count: int, scratch: int, phase: int, like: Any
) -> None:
    """Attention of every segment over its part of the pool."""
    head_dim, group, held = shape.head_dim, shape.heads // shape.kv_heads, operand(like)
    head_bytes, q_bytes = head_dim * size_of(like), head_dim * size_of(held)
    slot = SPLIT_TOKENS_MAX * group * (head_dim + 2) * 4
    block = QUERY_TOKENS * group * (head_dim + 2) * 4
    state, next_state, q, work = scratch, scratch + block, scratch + 2 * block, scratch + 2 * block + block
    counters = b.sync + (LAYER_PHASES * shape.layers + OUTER_PHASES) * PHASE_BYTES
    mine = 0
    while True:
        claimed = claim(b.sync + phase * PHASE_BYTES, 1)
        if claimed >= count * shape.kv_heads:
            break
        task, kv_head = claimed // shape.kv_heads, claimed % shape.kv_heads
        at, first, queries, start = tasks[task, 0], tasks[task, 1], tasks[task, 2], tasks[task, 3]
        row, base, past = segments[at, 0] + first, segments[at, 2], segments[at, 3]
        rows, end = queries * group, past + first + queries
        for token in range(queries):
            source = b.queries + ((row + token) * shape.heads + kv_head * group) * q_bytes
            for piece in range(0, group * q_bytes, LANES * 4):
                store(q + token * group * q_bytes + piece, load(source + piece, FULL), FULL)
        plane = b.pool_tokens * head_bytes
        keys = b.pool + (index * 2 * shape.kv_heads + kv_head) * plane + base * head_bytes
        values = keys + shape.kv_heads * plane
        visible = past + first + 1
        if start < 0:
            for span in range(0, end, SPAN_TOKENS):
                result = state if span == 0 else next_state
                attend_span(
                    shape, q, rows, visible, keys, values, span, min(end, span + SPAN_TOKENS), result, work, like
                )
                if span > 0:
                    merge_span(rows, head_dim, state, next_state)
            write_attended(shape, b, state, row, rows, kv_head, like)
        else:
            spans = (end + SPAN_TOKENS - 1) // SPAN_TOKENS
            slots = b.partials + (tasks[task, 4] * shape.kv_heads + kv_head * spans) * slot
            result = slots + start // SPAN_TOKENS * slot
            attend_span(shape, q, rows, visible, keys, values, start, min(end, start + SPAN_TOKENS), result, work, like)
            # Whoever ends the segment's last span merges them all, in order. Counters go on over the layers.
            ended = claim(counters + (at * shape.kv_heads + kv_head) * 8, 1) + 1
            if ended == (index + 1) * spans:
                for span in range(1, spans):
                    merge_span(rows, head_dim, slots, slots + span * slot)
                write_attended(shape, b, slots, row, rows, kv_head, like)
        mine += 1
    finish(b.sync, phase, mine, count * shape.kv_heads)
