"""Attention over block tables as one Triton kernel, for chunks and decode steps alike.

An online softmax over the keys a tile at a time: keys and values are read where they lie, through the table, and a
KV head's group of query heads shares every read. Where an iteration alone would not fill the device (a few sequences,
however long), each context is split between programs, and a second kernel puts their shares together (as in
Flash-Decoding: Dao et al. 2023). With ``TRITON_INTERPRET=1`` in the environment before this module
is imported, the kernel runs on CPU tensors, which is how it is tested where there is no GPU.
"""

# The kernel's arguments are Triton's own values, which have no types here.
# pyright: basic

import math
from typing import Any

import torch
import triton
import triton.language as tl

KEYS_PER_TILE = 128
"""Divided by an element's bytes."""
ROWS_PER_TILE = 64
"""Query rows of one program where a sequence brings many tokens; a row is one token's one head."""
_ROWS_MIN = 16
"""The least that the matrix units take."""
PROGRAMS = 512
"""As many fill a device: contexts are split until there are about so many, in at most ``SPLITS_MAX`` parts."""
SPLITS_MAX = 32
ALL, SOME = tl.constexpr(True), tl.constexpr(False)
"""Keys of a tile that are there."""


def tokens_per_tile(group: int, decode: bool) -> int:
    """How many tokens of a sequence one program attends for, given the query heads per KV head."""
    padded = triton.next_power_of_2(group)
    return max(1, (_ROWS_MIN if decode else ROWS_PER_TILE) // padded)


def attend_paged(
    queries: torch.Tensor,
    kv: torch.Tensor,
    tables: torch.Tensor,
    spans: torch.Tensor,
    tiles: torch.Tensor,
    tile_tokens: int,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of an iteration's tokens over their sequences' KV, the new tokens' own included.

    ``queries`` is ``[rows, heads, head_dim]``, contiguous; ``kv`` one layer ``[blocks, 2, kv_heads, block_tokens,
    head_dim]`` of the pool; ``tables`` int32 ``[sequences, blocks_max]``; ``spans`` int32 ``[sequences, 3]``: first
    row, new tokens, tokens before them; ``tiles`` int32 ``[tiles, 2]``: a sequence, and the first of the
    ``tile_tokens`` new tokens of it that the program attends for. Nothing is read on the host, so that a launch can
    be captured in a graph. Returns ``[rows, heads, head_dim]``.
    """
    rows, heads, head_dim = queries.shape
    kv_heads, block_tokens = kv.shape[2], kv.shape[3]
    group = heads // kv_heads
    padded = triton.next_power_of_2(group)
    out = torch.empty_like(queries)
    splits = 1
    while splits < SPLITS_MAX and 2 * splits * len(tiles) * kv_heads <= PROGRAMS:
        splits *= 2
    head_dim_padded = max(16, triton.next_power_of_2(head_dim))
    # Of each split: the sum of its weighted values, its highest score, and the sum of its weights.
    shares = queries.new_empty((splits, rows, heads, head_dim_padded), dtype=torch.float32) if splits > 1 else out
    sums = queries.new_empty((2, splits, rows, heads), dtype=torch.float32) if splits > 1 else out
    sizes: dict[str, Any] = {"HEADS": heads, "HEAD_DIM": head_dim, "HEAD_DIM_PADDED": head_dim_padded, "SPLITS": splits}
    tiling: dict[str, Any] = {
        "WINDOW": window or 0,
        "GROUP": group,
        "GROUP_PADDED": padded,
        "BLOCK_TOKENS": block_tokens,
        "TILE_TOKENS": tile_tokens,
        "ROWS": max(_ROWS_MIN, padded * tile_tokens),
        "KEYS": KEYS_PER_TILE // queries.itemsize,
    }
    strides = (tables.stride(0), kv.stride(0), kv.stride(1), kv.stride(2))
    scale = math.log2(math.e) * head_dim**-0.5
    attend = _attend[(len(tiles), kv_heads, splits)]
    attend(queries, kv, out, shares, sums, tables, spans, tiles, scale, rows, *strides, **sizes, **tiling)
    if splits > 1:
        _combine[(rows, heads)](shares, sums, out, rows, **sizes)
    return out


@triton.jit(do_not_specialize=["rows_count", "table_stride"])
def _attend(
    queries,
    kv,
    out,
    shares,
    sums,
    tables,
    spans,
    tiles,
    scale,
    rows_count,
    table_stride,
    block_stride,
    value_stride,
    head_stride,
    HEADS: tl.constexpr,  # noqa: N803 - constants of a compiled kernel
    HEAD_DIM: tl.constexpr,  # noqa: N803
    HEAD_DIM_PADDED: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    GROUP_PADDED: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    TILE_TOKENS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
):
    """``scale`` includes the logarithm of e to base 2: weights are powers of two."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    start = tl.load(spans + 3 * sequence)
    count = tl.load(spans + 3 * sequence + 1)
    past = tl.load(spans + 3 * sequence + 2)

    rows = tl.arange(0, ROWS)
    token = first + rows // GROUP_PADDED
    member = rows % GROUP_PADDED
    valid = (rows < TILE_TOKENS * GROUP_PADDED) & (token < count) & (member < GROUP)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    places = ((start + token).to(tl.int64) * HEADS + kv_head * GROUP + member) * HEAD_DIM
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    query = tl.load(queries + places[:, None] + dims[None, :], mask=mask, other=0.0)

    position = past + token
    end = past + tl.minimum(first + TILE_TOKENS, count)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(past + first - WINDOW + 1, 0)
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - begin, KEYS), SPLITS) * KEYS
        begin += split * share
        end = tl.minimum(end, begin + share)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, HEAD_DIM_PADDED), tl.float32)
    table = tables + sequence * table_stride
    kv += kv_head * head_stride
    hidden = begin
    if WINDOW == 0:
        # Up to the tile's first token, its own included, every token of the tile sees every key.
        hidden += tl.maximum(tl.minimum(end, past + first + 1) - begin, 0) // KEYS * KEYS
        for at in range(begin, hidden, KEYS):
            key = at + tl.arange(0, KEYS)
            keys, values = _read(kv, table, key, end, dims, block_stride, value_stride, HEAD_DIM, BLOCK_TOKENS, ALL)
            scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_highest[:, None])
            fade = tl.exp2(highest - new_highest)
            total = total * fade + tl.sum(weights, 1)
            result = result * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            highest = new_highest
    for at in range(hidden, end, KEYS):
        key = at + tl.arange(0, KEYS)
        keys, values = _read(kv, table, key, end, dims, block_stride, value_stride, HEAD_DIM, BLOCK_TOKENS, SOME)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        visible = (key[None, :] <= position[:, None]) & (key < end)[None, :]
        if WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet has no highest score: minus infinity less itself is no number.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(highest - shift)
        total = total * fade + tl.sum(weights, 1)
        result = result * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        highest = new_highest
    if SPLITS == 1:
        result = result / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out + places[:, None] + dims[None, :], result.to(query.dtype), mask=mask)
    else:
        mine = (split.to(tl.int64) * rows_count + start + token) * HEADS + kv_head * GROUP + member
        tl.store(shares + mine[:, None] * HEAD_DIM_PADDED + dims[None, :], result, mask=valid[:, None])
        tl.store(sums + mine, highest, mask=valid)
        tl.store(sums + SPLITS * rows_count * HEADS + mine, total, mask=valid)


@triton.jit
def _read(
    kv,
    table,
    key,
    end,
    dims,
    block_stride,
    value_stride,
    HEAD_DIM: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    THERE: tl.constexpr,  # noqa: N803
):
    """Keys and values of a tile; ``ALL`` are there, or those before ``end``."""
    if THERE:
        block = tl.load(table + key // BLOCK_TOKENS)
    else:
        block = tl.load(table + key // BLOCK_TOKENS, mask=key < end, other=0)
    slots = block.to(tl.int64) * block_stride + (key % BLOCK_TOKENS) * HEAD_DIM
    places = kv + slots[:, None] + dims[None, :]
    if THERE and dims.shape[0] == HEAD_DIM:
        keys = tl.load(places)
        values = tl.load(places + value_stride)
    else:
        # Unmasked values of tokens that are not there could be no numbers: zero times those is no number either.
        read = (key < end)[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(places, mask=read, other=0.0)
        values = tl.load(places + value_stride, mask=read, other=0.0)
    return keys, values


@triton.jit(do_not_specialize=["rows_count"])
def _combine(
    shares,
    sums,
    out,
    rows_count,
    HEADS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    HEAD_DIM_PADDED: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
):
    place = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    split = tl.arange(0, SPLITS)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    at = split.to(tl.int64) * rows_count * HEADS + place
    highest = tl.load(sums + at)
    total = tl.load(sums + SPLITS * rows_count * HEADS + at)
    # Every token sees itself: some split has a score.
    weights = tl.exp2(highest - tl.max(highest, 0))
    share = tl.load(shares + at[:, None] * HEAD_DIM_PADDED + dims[None, :])
    result = tl.sum(share * weights[:, None], 0) / tl.sum(total * weights, 0)  # pyright: ignore[reportOperatorIssue]
    tl.store(out + place * HEAD_DIM + dims, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
