"""Reading a model's shape and weights: safetensors in the hub's layout, or GGUF, into fused matrices."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import torch
from blake3 import blake3
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open

from tracehaul.engine.gguf_file import GGUFError, GGUFFile, read_gguf
from tracehaul.engine.source import ModelSource, SourceError

_REVISION_BYTES = 12


class RopeScaling(msgspec.Struct, frozen=True):
    """Llama 3's stretching of rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


class ModelConfig(msgspec.Struct, frozen=True):
    """A Llama-family decoder's shape."""

    layers: int
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
    qk_norm: bool
    tied: bool
    """The output layer is the embedding."""


class LayerWeights(msgspec.Struct):
    """One decoder layer; matrices are ``[out, in]``."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    """Rows of all query heads, then key heads, then value heads."""
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Weights(msgspec.Struct):
    """All of a model, on its device."""

    config: ModelConfig
    revision: str
    """Hash of the shape and of the weight files' bytes: equal strings mean equal weights."""
    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: torch.Tensor
    """Output layer ``[vocab, hidden]``; the embedding itself where they are tied."""


def load_weights(source: ModelSource, dtype: torch.dtype, device: torch.device) -> Weights:
    """Read a model. Peak memory beyond the weights is a few tensors.

    Raises:
        SourceError: a file is missing or damaged, or the model has a feature that this engine does not run.
    """
    try:
        reader = _GGUFReader(source.path) if source.kind == "gguf" else _FolderReader(source)
        config = reader.config

        def place(tensor: torch.Tensor) -> torch.Tensor:
            # Normalization weights are vectors, small and applied in float32.
            return tensor.to(device=device, dtype=dtype if tensor.dim() > 1 else torch.float32).contiguous()

        embedding = place(reader.tensor("model.embed_tokens.weight"))
        layers = [_layer(reader, config, at, place) for at in range(config.layers)]
        head = embedding if config.tied else place(reader.tensor("lm_head.weight"))
        norm = place(reader.tensor("model.norm.weight"))
        _check_shapes(config, embedding, layers, head)
        return Weights(config, _revision(config, reader.files()), embedding, layers, norm, head)
    except (OSError, GGUFError, SafetensorError) as error:
        raise SourceError(f"{source.name}: cannot read the weights: {error}") from error
    except KeyError as error:
        raise SourceError(f"{source.name}: the model's files lack {error}") from error


def _layer(
    reader: "_GGUFReader | _FolderReader",
    config: ModelConfig,
    at: int,
    place: Callable[[torch.Tensor], torch.Tensor],
) -> LayerWeights:
    def get(name: str) -> torch.Tensor:
        return reader.tensor(f"model.layers.{at}.{name}")

    def fused(*names: str) -> torch.Tensor:
        return place(torch.cat([get(name) for name in names]))

    parts = [f"self_attn.{part}_proj" for part in "qkv"]
    qkv = fused(*(f"{part}.weight" for part in parts))
    return LayerWeights(
        attention_norm=place(get("input_layernorm.weight")),
        qkv=qkv,
        qkv_bias=fused(*(f"{part}.bias" for part in parts)).to(qkv.dtype) if config.qkv_bias else None,
        q_norm=place(get("self_attn.q_norm.weight")) if config.qk_norm else None,
        k_norm=place(get("self_attn.k_norm.weight")) if config.qk_norm else None,
        out=place(get("self_attn.o_proj.weight")),
        mlp_norm=place(get("post_attention_layernorm.weight")),
        gate_up=fused("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        down=place(get("mlp.down_proj.weight")),
    )


def _check_shapes(config: ModelConfig, embedding: torch.Tensor, layers: list[LayerWeights], head: torch.Tensor) -> None:
    c = config
    wide = (c.heads + 2 * c.kv_heads) * c.head_dim
    pairs = [(embedding, (c.vocab_size, c.hidden)), (head, (c.vocab_size, c.hidden))]
    for layer in layers:
        pairs += [(layer.qkv, (wide, c.hidden)), (layer.out, (c.hidden, c.heads * c.head_dim))]
        pairs += [(layer.gate_up, (2 * c.intermediate, c.hidden)), (layer.down, (c.hidden, c.intermediate))]
    for tensor, shape in pairs:
        if tuple(tensor.shape) != shape:
            raise SourceError(f"a weight has shape {tuple(tensor.shape)} where the config says {shape}")


def _revision(config: ModelConfig, files: list[Path]) -> str:
    digest = blake3(msgspec.json.encode(config), max_threads=blake3.AUTO)
    for file in files:
        digest.update_mmap(file)
    return digest.hexdigest()[: 2 * _REVISION_BYTES]


# --- the hub's layout ---------------------------------------------------------------------------------------


class _FolderReader:
    """``config.json`` and one or several ``*.safetensors``."""

    def __init__(self, source: ModelSource) -> None:
        self._folder = source.path
        self._where = dict(self._index())
        raw = _read_json(source.path / "config.json")
        self.config = _hub_config(source, raw, untied="lm_head.weight" in self._where)

    def files(self) -> list[Path]:
        return [self._folder / name for name in sorted(set(self._where.values()))]

    def tensor(self, name: str) -> torch.Tensor:
        # Opened per tensor: opening reads a small header only, and no map outlives the read.
        with safe_open(self._folder / self._where[name], framework="pt") as file:
            return file.get_tensor(name)

    def _index(self) -> Iterator[tuple[str, str]]:
        index = self._folder / "model.safetensors.index.json"
        if index.is_file():
            yield from _read_json(index)["weight_map"].items()
            return
        file = self._folder / "model.safetensors"
        if not file.is_file():
            raise SourceError(f"{self._folder} has no model.safetensors (other weight formats are not read)")
        with safe_open(file, framework="pt") as opened:
            yield from ((name, file.name) for name in opened.keys())  # noqa: SIM118 - not a dict


def _hub_config(source: ModelSource, raw: dict[str, Any], untied: bool) -> ModelConfig:
    hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    _refuse_features(source, raw)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    # Absent keys mean the architecture's defaults, which its configs leave out.
    tied_default = source.architecture != "llama"
    return ModelConfig(
        layers=int(raw["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        intermediate=int(raw["intermediate_size"]),
        vocab_size=int(raw["vocab_size"]),
        context_max=int(raw["max_position_embeddings"]),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
        rope_scaling=_rope_scaling(source, rope),
        norm_eps=float(raw["rms_norm_eps"]),
        qkv_bias=source.architecture == "qwen2",
        qk_norm=source.architecture == "qwen3",
        tied=bool(raw.get("tie_word_embeddings", tied_default)) or not untied,
    )


def _refuse_features(source: ModelSource, raw: dict[str, Any]) -> None:
    """Say by name what this engine would compute wrongly."""
    for key in ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config"):
        if raw.get(key):
            raise SourceError(f"{source.name}: {key} in its config is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise SourceError(f"{source.name}: activation {raw['hidden_act']} is not supported")


def _rope_scaling(source: ModelSource, rope: dict[str, Any]) -> RopeScaling | None:
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return None
        case "llama3":
            return RopeScaling(
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_context=int(rope["original_max_position_embeddings"]),
            )
        case other:
            raise SourceError(f"{source.name}: rope type {other} is not supported")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise SourceError(f"{path}: {error}") from error


# --- GGUF ---------------------------------------------------------------------------------------------------

_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


class _GGUFReader:
    """One GGUF file of the llama architecture; tensors come dequantized, under the hub's names."""

    def __init__(self, path: Path) -> None:
        self._file = read_gguf(path)
        self._data = np.memmap(path, np.uint8, mode="r")
        self.config = _gguf_config(self._file)

    def files(self) -> list[Path]:
        return [self._file.path]

    def tensor(self, name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, layer, part = module.split(".", 3)
            stored = f"blk.{layer}.{_GGUF_NAMES[part]}.weight"
        else:
            stored = f"{_GGUF_NAMES[module]}.weight"
        values = torch.from_numpy(self._dequantized(stored))
        # The converter interleaves the two rotary halves of each query and key head.
        if module.endswith(".q_proj"):
            return _split_halves(values, self.config.heads)
        if module.endswith(".k_proj"):
            return _split_halves(values, self.config.kv_heads)
        return values

    def _dequantized(self, stored: str) -> np.ndarray:
        tensor = self._file.tensors[stored]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = tensor.shape[::-1]
        size = math.prod(shape) // block * block_bytes
        raw = self._data[tensor.offset : tensor.offset + size]
        if len(raw) < size:
            raise GGUFError(f"{stored} is cut off")
        rows = np.asarray(raw).reshape(*shape[:-1], shape[-1] // block * block_bytes)
        return np.array(dequantize(rows, kind), dtype=np.float32).reshape(shape)


def _gguf_config(file: GGUFFile) -> ModelConfig:
    meta, name = file.metadata, str(file.path)
    if "rope_freqs.weight" in file.tensors or meta.get("llama.rope.scaling.type", "none") != "none":
        raise SourceError(f"{name}: scaled rotary frequencies in GGUF are not supported: use the model's hub folder")
    hidden, heads = int(meta["llama.embedding_length"]), int(meta["llama.attention.head_count"])
    return ModelConfig(
        layers=int(meta["llama.block_count"]),
        hidden=hidden,
        heads=heads,
        kv_heads=int(meta.get("llama.attention.head_count_kv", heads)),
        head_dim=int(meta.get("llama.attention.key_length", hidden // heads)),
        intermediate=int(meta["llama.feed_forward_length"]),
        vocab_size=int(file.tensors["token_embd.weight"].shape[1]),
        context_max=int(meta["llama.context_length"]),
        rope_theta=float(meta.get("llama.rope.freq_base", 10_000.0)),
        rope_scaling=None,
        norm_eps=float(meta["llama.attention.layer_norm_rms_epsilon"]),
        qkv_bias=False,
        qk_norm=False,
        tied="output.weight" not in file.tensors,
    )


def _split_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
