"""What a launch must know of a model before any engine runs: how large a block of its KV is.

Read from the files' headers alone, without torch, so that a launch stays quick.
"""

from typing import Any

import msgspec

from cluster.rundir import ClusterFault
from tracehaul.engine.gguf_file import GGUFError, read_gguf
from tracehaul.engine.source import ModelSource
from tracehaul.wire.hashing import KVLayout

_ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}


def kv_layout(source: ModelSource, dtype: str) -> KVLayout:
    """The size of a model's KV blocks; its identity (the revision) is for the engine to tell.

    Raises:
        ClusterFault: the model's files do not say.
    """
    try:
        layers, kv_heads, head_dim = _gguf_shape(source) if source.kind == "gguf" else _hub_shape(source)
    except (OSError, GGUFError, msgspec.MsgspecError, KeyError, ValueError, TypeError) as error:
        raise ClusterFault(f"{source.name}: its files do not tell the shape of its KV: {error}") from error
    return KVLayout(
        model=source.name,
        dtype=dtype,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        element_bytes=_ELEMENT_BYTES[dtype],
    )


def _gguf_shape(source: ModelSource) -> tuple[int, int, int]:
    meta = read_gguf(source.path).metadata
    hidden, heads = int(meta["llama.embedding_length"]), int(meta["llama.attention.head_count"])
    return (
        int(meta["llama.block_count"]),
        int(meta.get("llama.attention.head_count_kv", heads)),
        int(meta.get("llama.attention.key_length", hidden // heads)),
    )


def _hub_shape(source: ModelSource) -> tuple[int, int, int]:
    raw = msgspec.json.decode((source.path / "config.json").read_bytes(), type=dict[str, Any])
    hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    return (
        int(raw["num_hidden_layers"]),
        int(raw.get("num_key_value_heads") or heads),
        int(raw.get("head_dim") or hidden // heads),
    )
