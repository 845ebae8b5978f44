"""What a GPU runs between a layer's products: Triton kernels, each in the place of several of torch's.

A decode step of few sequences is bound by how many kernels it launches, not by what they compute. With
``TRITON_INTERPRET=1`` they run on CPU tensors, as in :mod:`tracehaul.engine.paged_attention`.
"""

# The kernels' arguments are Triton's own values, which have no types here.
# pyright: basic

from typing import Any

import torch
import triton
import triton.language as tl

from tracehaul.engine.paged import Kernels
from tracehaul.engine.paged_attention import attend_paged, tokens_per_tile

ROWS_PER_PROGRAM = 8
GATED_PER_PROGRAM = 1024


def add_norm(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """Add ``[rows, size]`` to the float32 ``hidden`` in place, and return its root mean square norm in ``dtype``."""
    rows, size = hidden.shape
    out = torch.empty((rows, size), dtype=dtype, device=hidden.device)
    constants: dict[str, Any] = {"ADD": added is not None, "SIZE": size, "PADDED": triton.next_power_of_2(size)}
    constants["num_warps"] = 8
    launch = _add_norm[(rows,)]
    launch(hidden, hidden if added is None else added, weight, out, eps, **constants)
    return out


def place(
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
    """Write an iteration's keys and values to their place in the pool; return its queries ``[rows, heads, head_dim]``.

    ``qkv`` is ``[rows, (heads + 2 * kv_heads) * head_dim]``; ``norms`` ``[2, head_dim]``, if queries and keys are
    normed; ``rope`` the tables of :func:`tracehaul.engine.rope.rope_tables`, if they are rotated; ``kv`` one layer
    ``[blocks, 2, kv_heads, block_tokens, head_dim]``; the others int64 ``[rows]``.
    """
    rows, kv_heads, head_dim = len(qkv), kv.shape[2], kv.shape[4]
    queries = torch.empty((rows, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    cos, sin = rope if rope is not None else (qkv, qkv)
    constants: dict[str, Any] = {
        "NORM": norms is not None,
        "ROPE": rope is not None,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HALF": head_dim // 2,
        "PADDED": triton.next_power_of_2(head_dim // 2),
        "ROWS": ROWS_PER_PROGRAM,
        "num_warps": 2,
    }
    where, strides = (positions, blocks, offsets), (kv.stride(0), kv.stride(1), kv.stride(2))
    launch = _place[(triton.cdiv(rows, ROWS_PER_PROGRAM), heads + 2 * kv_heads)]
    normed = qkv if norms is None else norms
    launch(qkv, normed, cos, sin, *where, queries, kv, eps, rows, *strides, **constants)
    return queries


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``[rows, 2 * size]``."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    constants: dict[str, Any] = {"SIZE": size, "EACH": GATED_PER_PROGRAM}
    launch = _gate[(triton.cdiv(rows * size, GATED_PER_PROGRAM),)]
    launch(gate_up, out, rows * size, **constants)
    return out


KERNELS = Kernels(attend_paged, tokens_per_tile, add_norm, place, gate)


@triton.jit
def _add_norm(
    hidden,
    added,
    weight,
    out,
    eps,
    ADD: tl.constexpr,  # noqa: N803 - constants of a compiled kernel
    SIZE: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
):
    start = tl.program_id(0).to(tl.int64) * SIZE
    at = tl.arange(0, PADDED)
    there = at < SIZE
    values = tl.load(hidden + start + at, mask=there, other=0.0)
    if ADD:
        values += tl.load(added + start + at, mask=there, other=0.0).to(tl.float32)
        tl.store(hidden + start + at, values, mask=there)
    scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    normed = values * scale * tl.load(weight + at, mask=there, other=0.0)
    tl.store(out + start + at, normed.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["count"])
def _place(
    qkv,
    norms,
    cos,
    sin,
    positions,
    blocks,
    offsets,
    queries,
    kv,
    eps,
    count,
    block_stride,
    value_stride,
    head_stride,
    NORM: tl.constexpr,  # noqa: N803
    ROPE: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    KV_HEADS: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    at = tl.arange(0, PADDED)
    valid = row < count
    there = valid[:, None] & (at < HALF)[None, :]
    source = qkv + ((row.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF)[:, None] + at[None, :]
    first = tl.load(source, mask=there, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=there, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORM:
            weight = norms + (head >= HEADS).to(tl.int32) * 2 * HALF + at
            scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)
            first *= scale[:, None] * tl.load(weight, mask=at < HALF, other=0.0)[None, :]
            second *= scale[:, None] * tl.load(weight + HALF, mask=at < HALF, other=0.0)[None, :]
        if ROPE:
            turn = tl.load(positions + row, mask=valid, other=0)[:, None] * HALF + at[None, :]
            c = tl.load(cos + turn, mask=there, other=0.0).to(tl.float32)
            s = tl.load(sin + turn, mask=there, other=0.0).to(tl.float32)
            turned = first * c - second * s
            second = second * c + first * s
            first = turned
    if head < HEADS:
        target = queries + ((row.to(tl.int64) * HEADS + head) * 2 * HALF)[:, None] + at[None, :]
        tl.store(target, first.to(queries.dtype.element_ty), mask=there)
        tl.store(target + HALF, second.to(queries.dtype.element_ty), mask=there)
    else:
        part = (head - HEADS) // KV_HEADS * value_stride + (head - HEADS) % KV_HEADS * head_stride
        block = tl.load(blocks + row, mask=valid, other=0)
        offset = tl.load(offsets + row, mask=valid, other=0)
        target = kv + (block * block_stride + part + offset * 2 * HALF)[:, None] + at[None, :]
        tl.store(target, first.to(kv.dtype.element_ty), mask=there)
        tl.store(target + HALF, second.to(kv.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["count"])
def _gate(
    gate_up,
    out,
    count,
    SIZE: tl.constexpr,  # noqa: N803
    EACH: tl.constexpr,  # noqa: N803
):
    at = tl.program_id(0).to(tl.int64) * EACH + tl.arange(0, EACH)
    there = at < count
    source = gate_up + at // SIZE * 2 * SIZE + at % SIZE
    gates = tl.load(source, mask=there, other=0.0).to(tl.float32)
    ups = tl.load(source + SIZE, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, (gates * tl.sigmoid(gates) * ups).to(out.dtype.element_ty), mask=there)
