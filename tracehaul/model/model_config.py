"""A decoder's shape, from the hub's ``config.json`` or a GGUF header: pure, and read before any weight is.

Whatever this engine would compute wrongly is refused here by name. Defaults are those that each architecture's
configs leave out.
"""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from tracehaul.model.gguf_file import GGUFFile

Architecture = Literal["llama", "mistral", "qwen2", "qwen3", "smollm3"]

_ACTIVATIONS = ("silu", "swish")
_MISTRAL_WINDOW = 4096
_QWEN3_HEAD_DIM = 128


class ConfigError(Exception):
    """The model has a feature that this engine does not run, or its config lacks something; the text says which."""


class LinearRope(msgspec.Struct, frozen=True, tag="linear"):
    """All rotary frequencies divided by ``factor``."""

    factor: float


class DynamicRope(msgspec.Struct, frozen=True, tag="dynamic"):
    """Dynamic NTK: past the trained context, the base grows with the position.

    A token is rotated by the frequencies that hold when it is the last one. That is what decoding token by token
    gives, and it keeps a block's KV a function of its tokens, however they were cut into chunks.
    """

    factor: float
    trained_context: int


class YarnRope(msgspec.Struct, frozen=True, tag="yarn"):
    """YaRN (arXiv:2309.00071): low frequencies interpolated, high ones kept, cosines and sines scaled."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool
    """The ramp between both starts and ends at whole dimensions."""


class Llama3Rope(msgspec.Struct, frozen=True, tag="llama3"):
    """Llama 3: slow turns are slowed by ``factor``, fast ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


RopeScaling = LinearRope | DynamicRope | YarnRope | Llama3Rope


class LayerKind(msgspec.Struct, frozen=True):
    """What differs between the layers of one model."""

    window: int | None
    """Sliding window: how many tokens a token sees, itself included; None: all before it."""
    rope: bool
    """False: no positions in this layer's attention."""


class ModelConfig(msgspec.Struct, frozen=True):
    """A Llama-family decoder's shape."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    context_max: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    """The output layer is the embedding."""
    kinds: tuple[LayerKind, ...]
    """One per layer."""

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.kinds)


def _checked(config: ModelConfig) -> ModelConfig:
    c = config
    for size in (c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.intermediate, c.vocab_size, c.context_max):
        if size <= 0:
            raise ValueError(f"a size is {size}")
    if c.heads % c.kv_heads or c.head_dim % 2:
        raise ValueError(f"{c.heads} heads of {c.head_dim} over {c.kv_heads} KV heads")
    if any(kind.window is not None and kind.window <= 0 for kind in c.kinds):
        raise ValueError("a sliding window is not positive")
    return config


# --- the hub's layout ---------------------------------------------------------------------------------------


def hub_config(architecture: Architecture, raw: Mapping[str, Any]) -> ModelConfig:
    """The shape that a ``config.json`` describes.

    Raises:
        ConfigError: see there.
    """
    with _reading("config"):
        return _checked(_hub_config(architecture, raw))


@contextmanager
def _reading(what: str) -> Generator[None]:
    """What is missing, or is not what it should be, becomes a sentence about ``what``."""
    try:
        yield
    except KeyError as error:
        raise ConfigError(f"its {what} lacks {error}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"its {what} does not make sense: {error}") from error


def _hub_config(architecture: Architecture, raw: Mapping[str, Any]) -> ModelConfig:
    _refuse_features(raw)
    hidden, heads, layers = (int(raw[key]) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    context = int(raw["max_position_embeddings"])
    scaling = _rope_scaling(rope, context)
    every_bias = architecture in ("llama", "qwen3", "smollm3") and bool(raw.get("attention_bias"))
    head_dim = raw.get("head_dim") or (_QWEN3_HEAD_DIM if architecture == "qwen3" else hidden // heads)
    theta_default = 2_000_000.0 if architecture == "smollm3" else 10_000.0
    return ModelConfig(
        hidden=hidden,
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(head_dim),
        intermediate=int(raw["intermediate_size"]),
        vocab_size=int(raw["vocab_size"]),
        context_max=_stretched(context, scaling),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or theta_default),
        rope_scaling=scaling,
        norm_eps=float(raw["rms_norm_eps"]),
        qkv_bias=architecture == "qwen2" or every_bias,
        out_bias=every_bias,
        mlp_bias=architecture in ("llama", "smollm3") and bool(raw.get("mlp_bias")),
        qk_norm=architecture == "qwen3",
        tied=bool(raw.get("tie_word_embeddings", architecture == "smollm3")),
        kinds=_kinds(architecture, raw, layers),
    )


def _refuse_features(raw: Mapping[str, Any]) -> None:
    if raw.get("quantization_config"):
        raise ConfigError("quantization_config in its config is not supported")
    rope = raw.get("rope_parameters") or {}
    if float(rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor in its config is not supported")
    activation = raw.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"activation {activation} is not supported")


def _kinds(architecture: Architecture, raw: Mapping[str, Any], layers: int) -> tuple[LayerKind, ...]:
    ropes = _rope_layers(raw, layers) if architecture == "smollm3" else [True] * layers
    match architecture:
        case "llama":
            windows: list[int | None] = [None] * layers
        case "mistral":
            windows = [raw.get("sliding_window", _MISTRAL_WINDOW)] * layers
        case "qwen2" | "qwen3":
            first = int(raw.get("max_window_layers", 28))
            windows = _some_windows(raw, [at >= first for at in range(layers)], default=4096)
        case "smollm3":
            windows = _some_windows(raw, [not rope for rope in ropes], default=None)
    return tuple(
        LayerKind(None if window is None else int(window), rope) for window, rope in zip(windows, ropes, strict=True)
    )


def _rope_layers(raw: Mapping[str, Any], layers: int) -> list[bool]:
    listed = raw.get("no_rope_layers")  # despite its name, 1 means that the layer does rotate
    if listed is None:
        interval = int(raw.get("no_rope_layer_interval", 4))
        return [(at + 1) % interval != 0 for at in range(layers)]
    if len(listed) < layers:
        raise ConfigError("no_rope_layers in its config is shorter than the model has layers")
    return [bool(rope) for rope in listed[:layers]]


def _some_windows(raw: Mapping[str, Any], unlisted: list[bool], default: int | None) -> list[int | None]:
    """Windows of the layers that have one: as ``layer_types`` lists them, else ``unlisted``."""
    window = raw.get("sliding_window", default)
    if not raw.get("use_sliding_window") or window is None:
        return [None] * len(unlisted)
    listed = raw.get("layer_types")
    if listed is None:
        return [window if windowed else None for windowed in unlisted]
    if unknown := set(listed) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"layer type {min(unknown)} is not supported")
    if len(listed) != len(unlisted):
        raise ConfigError("layer_types in its config is not as long as the model has layers")
    return [window if kind == "sliding_attention" else None for kind in listed]


def _rope_scaling(rope: Mapping[str, Any], context: int) -> RopeScaling | None:
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ConfigError("rotary parameters per layer type are not supported")
    original = int(rope.get("original_max_position_embeddings") or context)
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return None
        case "linear":
            return LinearRope(float(rope["factor"]))
        case "dynamic":
            return DynamicRope(float(rope["factor"]), context)
        case "yarn":
            return _yarn(rope, original, float(rope.get("factor") or context / original))
        case "llama3":
            return Llama3Rope(
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_context=original,
            )
        case other:
            raise ConfigError(f"rope type {other} is not supported")


def _yarn(rope: Mapping[str, Any], original: int, factor: float) -> YarnRope:
    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        one, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = temperature(one) / temperature(all_dims) if one and all_dims else temperature(1.0)
    return YarnRope(
        factor=factor,
        original_context=original,
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        attention_factor=float(attention),
        truncate=bool(rope.get("truncate", True)),
    )


def _stretched(context: int, scaling: RopeScaling | None) -> int:
    """The longest context, given the one that the config names.

    Llama 3's configs name the stretched one; those of the others the trained one, or either.
    """
    match scaling:
        case LinearRope(factor) | DynamicRope(factor):
            return int(context * factor)
        case YarnRope(factor, original):
            return max(context, int(original * factor))
        case _:
            return context


# --- GGUF ---------------------------------------------------------------------------------------------------


def gguf_config(architecture: Architecture, file: GGUFFile) -> ModelConfig:
    """The shape that a GGUF file's header describes.

    Raises:
        ConfigError: see there.
    """
    with _reading("header"):
        return _checked(_gguf_config(architecture, file))


def _gguf_config(architecture: Architecture, file: GGUFFile) -> ModelConfig:
    meta = {key.removeprefix(f"{architecture}."): value for key, value in file.metadata.items()}
    if "rope_freqs.weight" in file.tensors or meta.get("rope.scaling.type", "none") != "none":
        raise ConfigError("scaled rotary frequencies in GGUF are not supported: use the model's hub folder")
    if meta.get("attention.sliding_window"):
        raise ConfigError("a sliding window in GGUF is not supported: use the model's hub folder")
    hidden, heads = int(meta["embedding_length"]), int(meta["attention.head_count"])
    return ModelConfig(
        hidden=hidden,
        heads=heads,
        kv_heads=int(meta.get("attention.head_count_kv", heads)),
        head_dim=int(meta.get("attention.key_length", hidden // heads)),
        intermediate=int(meta["feed_forward_length"]),
        vocab_size=int(file.tensors["token_embd.weight"].shape[1]),
        context_max=int(meta["context_length"]),
        rope_theta=float(meta.get("rope.freq_base", 10_000.0)),
        rope_scaling=None,
        norm_eps=float(meta["attention.layer_norm_rms_epsilon"]),
        qkv_bias=architecture == "qwen2",
        out_bias=False,
        mlp_bias=False,
        qk_norm=architecture == "qwen3",
        tied="output.weight" not in file.tensors,
        kinds=(LayerKind(window=None, rope=True),) * int(meta["block_count"]),
    )
