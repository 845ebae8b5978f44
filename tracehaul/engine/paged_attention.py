"""Attention over block tables as one Triton kernel, for chunks and decode steps alike.

An online softmax over the keys a tile at a time: keys and values are read where they lie, through the table, and a
KV head's group of query heads shares every read. With ``TRITON_INTERPRET=1`` in the environment before this module
is imported, the kernel runs on CPU tensors, which is how it is tested where there is no GPU.
"""

# The kernel's arguments are Triton's own values, which have no types here.
# pyright: basic

from typing import Any

import torch
import triton
import triton.language as tl

KEYS_PER_TILE = 32
ROWS_PER_TILE = 64
"""Query rows of one program where a sequence brings many tokens; a row is one token's one head."""
_ROWS_MIN = 16
"""The least that the matrix units take."""


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
    _, heads, head_dim = queries.shape
    kv_heads, block_tokens = kv.shape[2], kv.shape[3]
    group = heads // kv_heads
    padded = triton.next_power_of_2(group)
    out = torch.empty_like(queries)
    constants: dict[str, Any] = {
        "WINDOW": window or 0,
        "HEADS": heads,
        "GROUP": group,
        "GROUP_PADDED": padded,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_TOKENS": block_tokens,
        "TILE_TOKENS": tile_tokens,
        "ROWS": max(_ROWS_MIN, padded * tile_tokens),
        "KEYS": KEYS_PER_TILE,
    }
    strides = (tables.stride(0), kv.stride(0), kv.stride(1), kv.stride(2))
    launch = _attend[(len(tiles), kv_heads)]
    launch(queries, kv, out, tables, spans, tiles, head_dim**-0.5, *strides, **constants)
    return out


@triton.jit
def _attend(
    queries,
    kv,
    out,
    tables,
    spans,
    tiles,
    scale,
    table_stride,
    block_stride,
    value_stride,
    head_stride,
    WINDOW: tl.constexpr,  # noqa: N803 - constants of a compiled kernel
    HEADS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    GROUP_PADDED: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    HEAD_DIM_PADDED: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    TILE_TOKENS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
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
    inside = dims < HEAD_DIM
    places = ((start + token).to(tl.int64) * HEADS + kv_head * GROUP + member) * HEAD_DIM
    mask = valid[:, None] & inside[None, :]
    query = tl.load(queries + places[:, None] + dims[None, :], mask=mask, other=0.0)

    position = past + token
    end = past + tl.minimum(first + TILE_TOKENS, count)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(past + first - WINDOW + 1, 0)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, HEAD_DIM_PADDED), tl.float32)
    for at in range(begin, end, KEYS):
        key = at + tl.arange(0, KEYS)
        there = key < end
        block = tl.load(tables + sequence * table_stride + key // BLOCK_TOKENS, mask=there, other=0)
        slots = block.to(tl.int64) * block_stride + kv_head * head_stride + (key % BLOCK_TOKENS) * HEAD_DIM
        read = there[:, None] & inside[None, :]
        keys = tl.load(kv + slots[:, None] + dims[None, :], mask=read, other=0.0)
        # Unmasked values of tokens that are not there could be no numbers: zero times those is no number either.
        values = tl.load(kv + value_stride + slots[:, None] + dims[None, :], mask=read, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        visible = key[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible & there[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet has no highest score: minus infinity less itself is no number.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp(scores - shift[:, None])
        fade = tl.exp(highest - shift)
        total = total * fade + tl.sum(weights, 1)
        result = result * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        highest = new_highest
    result = result / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + places[:, None] + dims[None, :], result.to(query.dtype), mask=mask)
