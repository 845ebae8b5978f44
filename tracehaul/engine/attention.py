"""Causal attention of new tokens over one sequence's KV, grouped queries without expanding the KV heads.

Shapes here: queries ``[tokens, heads, head_dim]`` are the sequence's last ``tokens`` positions; keys and values
``[kv_heads, context, head_dim]`` are strided views into the pool, the new tokens' own included.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

_SCORES_MAX_BYTES = 16 << 20
"""Bound of one tile of scores: it should stay in the last-level cache."""
_TILE_TOKENS_MIN = 16
_TILE_TOKENS_MAX = 256


def attend_one(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One new token: ``[1, heads, head_dim]``. A KV head's group of queries becomes the query length."""
    kv_heads, _, head_dim = keys.shape
    grouped = queries.view(1, kv_heads, -1, head_dim)
    return scaled_dot_product_attention(grouped, keys[None], values[None]).view_as(queries)


def attend_fused(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Several new tokens by the fused kernel: what a GPU wants."""
    # Imported here: it brings torch's compiler along, 150 MB that an engine on the CPU has no use for.
    from torch.nn.attention.bias import causal_lower_right

    mask = causal_lower_right(queries.shape[0], keys.shape[1])
    query = queries.transpose(0, 1)[None]
    out = scaled_dot_product_attention(query, keys[None], values[None], attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


class TiledAttention:
    """Several new tokens by plain matrix products, a tile of queries against the whole context at a time.

    On a CPU this is over twice as fast in bfloat16 as torch's fused kernel, which multiplies at float32 speed:
    the batched products run on the CPU's bfloat16 units. Scores pass through the model's own dtype.
    Holds scratch memory for one thread's use.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._scores = torch.empty(0, dtype=dtype)
        self._weights = torch.empty(0, dtype=dtype)
        self._future = torch.full((_TILE_TOKENS_MAX, _TILE_TOKENS_MAX), float("-inf"), dtype=dtype).triu(1)

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        tokens, heads, head_dim = queries.shape
        kv_heads, context, _ = keys.shape
        past, group = context - tokens, heads // kv_heads
        # [kv_heads, tokens, group, head_dim]: any run of tokens is then a plain matrix per KV head.
        folded = queries.view(tokens, kv_heads, group, head_dim).transpose(0, 1).contiguous()
        out = torch.empty_like(folded)
        tile = self._tile_tokens(heads, context)
        for start in range(0, tokens, tile):
            end = min(start + tile, tokens)
            size, seen = end - start, past + end
            scores, weights = self._scratch(kv_heads, size * group, seen)
            tile_queries = folded[:, start:end].view(kv_heads, size * group, head_dim)
            visible = keys[:, :seen].transpose(1, 2)
            torch.baddbmm(scores, tile_queries, visible, beta=0, alpha=head_dim**-0.5, out=scores)
            scores.view(kv_heads, size, group, seen)[..., past + start :].add_(self._future[:size, None, :size])
            torch.softmax(scores, -1, out=weights)
            out[:, start:end] = torch.bmm(weights, values[:, :seen]).view(kv_heads, size, group, head_dim)
        return out.transpose(0, 1).reshape(tokens, heads, head_dim)

    def _tile_tokens(self, heads: int, context: int) -> int:
        fitting = _SCORES_MAX_BYTES // (heads * context * self._dtype.itemsize)
        return max(_TILE_TOKENS_MIN, min(_TILE_TOKENS_MAX, fitting))

    def _scratch(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two arrays that live from call to call: fresh ones would be page-faulted in every time."""
        size = shape[0] * shape[1] * shape[2]
        if self._scores.numel() < size:
            self._scores = torch.empty(size, dtype=self._dtype)
            self._weights = torch.empty(size, dtype=self._dtype)
        return self._scores[:size].view(shape), self._weights[:size].view(shape)
