"""Causal attention of new tokens over one sequence's KV, grouped queries without expanding the KV heads.

Shapes here: queries ``[tokens, heads, head_dim]`` are the sequence's last ``tokens`` positions; keys and values
``[kv_heads, context, head_dim]`` are strided views into the pool, the new tokens' own included. With a ``window``, a
token sees so many of the last tokens, itself among them.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

_SCORES_MAX_BYTES = 16 << 20
"""Bound of one tile of scores: it should stay in the last-level cache."""
_TILE_TOKENS_MIN = 16
_TILE_TOKENS_MAX = 256


def attend_one(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """One new token: ``[1, heads, head_dim]``. A KV head's group of queries becomes the query length."""
    if window is not None:
        keys, values = keys[:, -window:], values[:, -window:]
    kv_heads, _, head_dim = keys.shape
    grouped = queries.view(1, kv_heads, -1, head_dim)
    return scaled_dot_product_attention(grouped, keys[None], values[None]).view_as(queries)


def attend_fused(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Several new tokens by the fused kernel: what a GPU wants."""
    tokens, context = queries.shape[0], keys.shape[1]
    if window is None:
        # Imported here: it brings torch's compiler along, 150 MB that an engine on the CPU has no use for.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(tokens, context)
    else:
        past = context - tokens
        square = torch.ones(tokens, context, dtype=torch.bool, device=queries.device)
        mask = square.tril(past).triu(past - window + 1)
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
        masked = torch.full((_TILE_TOKENS_MAX, _TILE_TOKENS_MAX), float("-inf"), dtype=dtype)
        self._future, self._past = masked.triu(1), masked.tril(-1)

    def __call__(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None = None
    ) -> torch.Tensor:
        tokens, heads, head_dim = queries.shape
        kv_heads, context, _ = keys.shape
        past, group = context - tokens, heads // kv_heads
        # [kv_heads, tokens, group, head_dim]: any run of tokens is then a plain matrix per KV head.
        folded = queries.view(tokens, kv_heads, group, head_dim).transpose(0, 1).contiguous()
        out = torch.empty_like(folded)
        tile = self._tile_tokens(heads, min(context, window + _TILE_TOKENS_MAX) if window else context)
        for start in range(0, tokens, tile):
            end = min(start + tile, tokens)
            # The tile's last token is at ``past + end - 1``; its first one sees from ``begin`` on.
            reach = 0 if window is None else past + start + 1 - window
            begin = max(0, reach)
            size, seen = end - start, past + end - begin
            scores, weights = self._scratch(kv_heads, size * group, seen)
            tile_queries = folded[:, start:end].view(kv_heads, size * group, head_dim)
            visible = keys[:, begin : past + end].transpose(1, 2)
            torch.baddbmm(scores, tile_queries, visible, beta=0, alpha=head_dim**-0.5, out=scores)
            by_token = scores.view(kv_heads, size, group, seen)
            by_token[..., seen - size :].add_(self._future[:size, None, :size])
            if window is not None:
                # A tile's later tokens see less far back: each one token less than the one before.
                ahead = begin - reach
                outside = max(0, min(size - 1 - ahead, seen))
                by_token[..., :outside].add_(self._past[:size, None, ahead : ahead + outside])
            torch.softmax(scores, -1, out=weights)
            out[:, start:end] = torch.bmm(weights, values[:, begin : past + end]).view(kv_heads, size, group, head_dim)
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
