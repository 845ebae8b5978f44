"""The Llama-family forward pass over an iteration's tokens and the KV pool."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear, rms_norm, silu

from tracehaul.engine.attention import TiledAttention, attend_fused, attend_one
from tracehaul.engine.rope import rope_tables, rotate
from tracehaul.engine.weights import LayerWeights, Weights


class Segment(NamedTuple):
    """One sequence's rows in an iteration."""

    row: int
    """Where its tokens start among the iteration's."""
    tokens: int
    base: int
    """Start of the sequence's range in the pool."""
    past: int
    """Tokens of it that are in the pool already."""


class Model:
    """Weights and tables. Used from one thread."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._config = weights.config
        table = weights.embedding
        self._cos, self._sin = rope_tables(weights.config, table.dtype, table.device)
        self._attend = TiledAttention(table.dtype) if table.device.type == "cpu" else attend_fused

    def forward(
        self, tokens: Sequence[int], segments: Sequence[Segment], pool: torch.Tensor, sampled_rows: Sequence[int]
    ) -> torch.Tensor:
        """Append every segment's tokens to its KV; float32 logits ``[len(sampled_rows), vocab]`` of those rows.

        All tokens go through the linear layers together; attention is per segment. Runs under ``inference_mode``.
        """
        device = self._weights.embedding.device
        positions = torch.cat([torch.arange(s.past, s.past + s.tokens) for s in segments])
        bases = torch.cat([torch.full((s.tokens,), s.base) for s in segments])
        slots = (bases + positions).to(device)
        positions = positions.to(device)
        cos, sin = self._cos[positions, None], self._sin[positions, None]
        hidden = self._weights.embedding[torch.tensor(tokens, device=device)].float()
        for layer, kv in zip(self._weights.layers, pool, strict=True):
            self._layer(layer, kv, hidden, cos, sin, slots, segments)
        if not sampled_rows:
            return torch.empty(0, self._config.vocab_size)
        last = self._norm(hidden[torch.tensor(sampled_rows, device=device)], self._weights.norm)
        return linear(last, self._weights.head).float()

    def _layer(
        self,
        layer: LayerWeights,
        kv: torch.Tensor,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        segments: Sequence[Segment],
    ) -> None:
        """One decoder layer, added onto ``hidden`` in place; ``kv`` is its part of the pool, written in place.

        ``hidden`` is float32 whatever the model's dtype: this family's residuals reach into the ten thousands, and
        rounding their sums to bfloat16 costs a third of the whole numerical error.
        """
        c = self._config
        rows = len(hidden)
        qkv = linear(self._norm(hidden, layer.attention_norm), layer.qkv, layer.qkv_bias)
        qkv = qkv.view(rows, c.heads + 2 * c.kv_heads, c.head_dim)
        turned = qkv[:, : c.heads + c.kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            queries, keys = turned.split([c.heads, c.kv_heads], dim=1)
            turned = torch.cat([self._norm(queries, layer.q_norm), self._norm(keys, layer.k_norm)], dim=1)
        if layer.rope:
            turned = rotate(turned, cos, sin)
        queries = turned[:, : c.heads]
        kv[0].index_copy_(1, slots, turned[:, c.heads :].transpose(0, 1))
        kv[1].index_copy_(1, slots, qkv[:, c.heads + c.kv_heads :].transpose(0, 1))
        attended = self._attention(queries, kv, segments, layer.window).reshape(rows, c.heads * c.head_dim)
        hidden.add_(linear(attended, layer.out, layer.out_bias))
        gate_up = linear(self._norm(hidden, layer.mlp_norm), layer.gate_up, layer.gate_up_bias)
        gate, up = gate_up.split(c.intermediate, dim=1)
        hidden.add_(linear(silu(gate).mul_(up), layer.down, layer.down_bias))

    def _attention(
        self, queries: torch.Tensor, kv: torch.Tensor, segments: Sequence[Segment], window: int | None
    ) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        for row, tokens, base, past in segments:
            keys, values = kv[:, :, base : base + past + tokens].unbind(0)
            attend = attend_one if tokens == 1 else self._attend
            parts.append(attend(queries[row : row + tokens], keys, values, window))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _norm(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = rms_norm(values.float(), (values.shape[-1],), weight, self._config.norm_eps)
        return normed.to(self._cos.dtype)
