"""Reading a model's shape and weights: safetensors in the hub's layout, or GGUF, into fused matrices."""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import msgspec
import numpy as np
import torch
from blake3 import blake3
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open

from tracehaul.model.gguf_file import GGUFError, GGUFFile, read_gguf
from tracehaul.model.model_config import ConfigError, ModelConfig, gguf_config
from tracehaul.model.source import ModelSource, SourceError, read_config

_REVISION_BYTES = 12


class LayerWeights(msgspec.Struct):
    """One decoder layer; matrices are ``[out, in]``.

    Where they are int8 there are scales, float32 ``[out]``: a row is its numbers times its scale.
    """

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    """Rows of all query heads, then key heads, then value heads."""
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    window: int | None
    """See :class:`tracehaul.model.model_config.LayerKind`."""
    rope: bool
    qkv_scales: torch.Tensor | None
    out_scales: torch.Tensor | None
    gate_up_scales: torch.Tensor | None
    down_scales: torch.Tensor | None


class Weights(msgspec.Struct):
    """All of a model, on its device."""

    config: ModelConfig
    revision: str
    """Hash of the shape, of the weight files' bytes and of rounding to int8: equal strings mean equal weights."""
    dtype: torch.dtype
    """Of activations and KV, and of matrices that are not int8."""
    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: torch.Tensor
    """Output layer ``[vocab, hidden]``; the embedding itself where they are tied."""
    embedding_scales: torch.Tensor | None
    head_scales: torch.Tensor | None


class Matrix(NamedTuple):
    """Weights ``[out, in]``, and their rows' scales where they are int8."""

    rows: torch.Tensor
    scales: torch.Tensor | None


def rounded(matrix: torch.Tensor) -> Matrix:
    """Each row as int8 between -127 and 127, and what one of these is worth there (float32)."""
    matrix = matrix.float()
    scales = matrix.abs().amax(dim=1).clamp(min=1e-30) / 127
    return Matrix((matrix / scales[:, None]).round_().to(torch.int8), scales)


def load_weights(source: ModelSource, dtype: torch.dtype, device: torch.device, *, int8: bool = False) -> Weights:
    """Read a model, with ``int8`` its matrices rounded to that. Peak memory beyond the weights is a few tensors.

    Raises:
        SourceError: a file is missing or damaged, or the model has a feature that this engine does not run.
    """
    with _reading(source):
        config, reader = _open(source)

        def place(tensor: torch.Tensor) -> torch.Tensor:
            # Normalization weights are vectors, small and applied in float32.
            return tensor.to(device=device, dtype=dtype if tensor.dim() > 1 else torch.float32).contiguous()

        def matrix(tensor: torch.Tensor) -> Matrix:
            return rounded(tensor.to(device)) if int8 else Matrix(place(tensor), None)

        embedding = matrix(reader.tensor("model.embed_tokens.weight"))
        layers = [_layer(reader, config, at, dtype, place, matrix) for at in range(config.layers)]
        head = embedding if config.tied else matrix(reader.tensor("lm_head.weight"))
        norm = place(reader.tensor("model.norm.weight"))
        _check_shapes(config, embedding.rows, layers, head.rows)
        return Weights(
            config,
            _revision(config, reader.files(), int8=int8),
            dtype,
            embedding.rows,
            layers,
            norm,
            head.rows,
            embedding.scales,
            head.scales,
        )


def identify(source: ModelSource, *, int8: bool) -> tuple[ModelConfig, str]:
    """The shape and the revision that :func:`load_weights` would return, and its errors."""
    with _reading(source):
        config, reader = _open(source)
        return config, _revision(config, reader.files(), int8=int8)


def _open(source: ModelSource) -> "tuple[ModelConfig, _GGUFReader | _FolderReader]":
    if source.kind == "gguf" and source.architecture != "foreign":
        file = read_gguf(source.path)
        config = gguf_config(source.architecture, file)
        return config, _GGUFReader(file, config)
    config, reader = read_config(source), _FolderReader(source.path)
    if not reader.has("lm_head.weight"):
        config = msgspec.structs.replace(config, tied=True)
    return config, reader


@contextmanager
def _reading(source: ModelSource) -> Generator[None]:
    try:
        yield
    except (OSError, ConfigError, GGUFError, SafetensorError) as error:
        raise SourceError(f"{source.name}: cannot read the weights: {error}") from error
    except KeyError as error:
        raise SourceError(f"{source.name}: the model's files lack {error}") from error


def _layer(
    reader: "_GGUFReader | _FolderReader",
    config: ModelConfig,
    at: int,
    dtype: torch.dtype,
    place: Callable[[torch.Tensor], torch.Tensor],
    matrix: Callable[[torch.Tensor], Matrix],
) -> LayerWeights:
    def get(name: str) -> torch.Tensor:
        return reader.tensor(f"model.layers.{at}.{name}")

    def fused(names: Sequence[str]) -> Matrix:
        return matrix(torch.cat([get(f"{name}.weight") for name in names]))

    def bias(present: bool, *names: str) -> torch.Tensor | None:
        # Added to a matrix product, in its dtype.
        return place(torch.cat([get(f"{name}.bias") for name in names])).to(dtype) if present else None

    heads, halves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    qkv, gate_up = fused(heads), fused(halves)
    out, down = matrix(get("self_attn.o_proj.weight")), matrix(get("mlp.down_proj.weight"))
    return LayerWeights(
        attention_norm=place(get("input_layernorm.weight")),
        qkv=qkv.rows,
        qkv_bias=bias(config.qkv_bias, *heads),
        q_norm=place(get("self_attn.q_norm.weight")) if config.qk_norm else None,
        k_norm=place(get("self_attn.k_norm.weight")) if config.qk_norm else None,
        out=out.rows,
        out_bias=bias(config.out_bias, "self_attn.o_proj"),
        mlp_norm=place(get("post_attention_layernorm.weight")),
        gate_up=gate_up.rows,
        gate_up_bias=bias(config.mlp_bias, *halves),
        down=down.rows,
        down_bias=bias(config.mlp_bias, "mlp.down_proj"),
        window=config.kinds[at].window,
        rope=config.kinds[at].rope,
        qkv_scales=qkv.scales,
        out_scales=out.scales,
        gate_up_scales=gate_up.scales,
        down_scales=down.scales,
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


def _revision(config: ModelConfig, files: list[Path], *, int8: bool) -> str:
    digest = blake3(msgspec.json.encode(config) + (b"int8" if int8 else b""), max_threads=blake3.AUTO)
    for file in files:
        digest.update_mmap(file)
    return digest.hexdigest()[: 2 * _REVISION_BYTES]


# --- the hub's layout ---------------------------------------------------------------------------------------


class _FolderReader:
    """One or several ``*.safetensors``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._where = dict(self._index())

    def files(self) -> list[Path]:
        return [self._folder / name for name in sorted(set(self._where.values()))]

    def has(self, name: str) -> bool:
        return name in self._where

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

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self._file = file
        self._data = np.memmap(file.path, np.uint8, mode="r")
        self._config = config

    def files(self) -> list[Path]:
        return [self._file.path]

    def tensor(self, name: str) -> torch.Tensor:
        values = torch.from_numpy(self._dequantized(_gguf_name(name)))
        # The converter interleaves the two rotary halves of each query and key head.
        if name.endswith(".q_proj.weight"):
            return _split_halves(values, self._config.heads)
        if name.endswith(".k_proj.weight"):
            return _split_halves(values, self._config.kv_heads)
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


def _gguf_name(name: str) -> str:
    """A tensor's name in a GGUF file, from the hub's."""
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"
    return f"{_GGUF_NAMES[module]}.{kind}"


def _split_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
