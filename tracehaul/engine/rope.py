"""Rotary position embedding: the tables of every scaling variant, and the rotation.

A token's rotation depends on its position alone, never on how long the sequence is by then: that keeps a block's KV
a function of the tokens up to its end.
"""

import math

import torch

from tracehaul.model.model_config import DynamicRope, LinearRope, Llama3Rope, ModelConfig, YarnRope


def rope_tables(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[context_max, head_dim / 2]``, computed in float32."""
    positions = torch.arange(config.context_max, dtype=torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    scale = 1.0
    match config.rope_scaling:
        case None:
            angles = torch.outer(positions, plain)
        case LinearRope(factor):
            angles = torch.outer(positions, plain / factor)
        case Llama3Rope() as scaling:
            angles = torch.outer(positions, _llama3(plain, scaling))
        case YarnRope() as scaling:
            angles = torch.outer(positions, _yarn(plain, scaling, config))
            scale = scaling.attention_factor
        case DynamicRope() as scaling:
            angles = positions[:, None] / _dynamic_bases(positions, scaling, config)[:, None] ** exponents
    return (angles.cos() * scale).to(device, dtype), (angles.sin() * scale).to(device, dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``[tokens, heads, head_dim]``; halves are the two coordinates, as the hub's models have it.

    ``cos`` and ``sin`` are ``[tokens, 1, head_dim / 2]``.
    """
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _llama3(frequencies: torch.Tensor, scaling: Llama3Rope) -> torch.Tensor:
    turns = scaling.original_context * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return frequencies * (blend + (1.0 - blend) / scaling.factor)


def _yarn(frequencies: torch.Tensor, scaling: YarnRope, config: ModelConfig) -> torch.Tensor:
    def dimension(turns: float) -> float:
        """Where in the head a frequency makes so many turns over the original context."""
        ratio = scaling.original_context / (turns * 2 * math.pi)
        return config.head_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    width = high - low or 0.001  # as the models were trained: never a division by zero
    interpolated = ((torch.arange(config.head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return frequencies * (1.0 - interpolated) + frequencies / scaling.factor * interpolated


def _dynamic_bases(positions: torch.Tensor, scaling: DynamicRope, config: ModelConfig) -> torch.Tensor:
    """The base at each position: the trained one up to the trained context, then growing."""
    lengths = (positions + 1.0).clamp(min=float(scaling.trained_context))
    stretch = scaling.factor * lengths / scaling.trained_context - (scaling.factor - 1.0)
    return config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2))
