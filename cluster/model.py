"""What a launch must know of a model before any engine runs: how large a block of its KV is, and what it takes.

Read from the files' headers and the tokenizer, without torch, so that a launch stays quick.
"""

from cluster.config import PoolConfig
from cluster.memory import ModelSize
from cluster.rundir import ClusterFault
from engines.sglang.adapter import SGLang
from engines.vllm.adapter import VLLM
from tracehaul.model.model_config import ModelConfig
from tracehaul.model.source import ModelSource, SourceError, read_any_config, read_config
from tracehaul.model.text import Text
from tracehaul.wire.hashing import KVLayout

_ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def kv_layout(source: ModelSource, dtype: str) -> KVLayout:
    """The size of a model's KV blocks; its identity (the revision) is for the engine to tell.

    Raises:
        ClusterFault: the model's files do not say.
    """
    config = _shape(source)
    return KVLayout(
        model=source.name,
        dtype=dtype,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        element_bytes=_ELEMENT_BYTES[dtype],
    )


def stock_layout(source: ModelSource, dtype: str) -> KVLayout:
    """As :func:`kv_layout`, of a model that any engine may run: enough to know how large its blocks are.

    Raises:
        ClusterFault: the model's files do not say.
    """
    if source.architecture != "foreign":
        return kv_layout(source, dtype)
    try:
        said = read_any_config(source)
    except SourceError as error:
        raise ClusterFault(str(error)) from error

    def number(*names: str) -> int | None:
        return next((value for name in names if isinstance(value := said.get(name), int)), None)

    layers, heads = number("num_hidden_layers", "n_layer"), number("num_attention_heads", "n_head")
    hidden, latent = number("hidden_size", "n_embd"), number("kv_lora_rank")
    kv_heads, head_dim = number("num_key_value_heads") or heads, number("head_dim")
    if latent is not None:  # one vector for all heads
        kv_heads, head_dim = 1, -(-(latent + (number("qk_rope_head_dim") or 0)) // 2)
    elif head_dim is None and hidden and heads:
        head_dim = hidden // heads
    if not (layers and kv_heads and head_dim):
        raise ClusterFault(f"{source.name}: its config.json does not say how large its KV is")
    return KVLayout(
        model=source.name,
        dtype=dtype,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        element_bytes=_ELEMENT_BYTES[dtype],
    )


def model_size(source: ModelSource, pool: PoolConfig, dtype: str) -> ModelSize:
    """What a worker of that pool holds of the model.

    Raises:
        ClusterFault: the model's files do not say.
    """
    dtype = pool.dtype or dtype
    if pool.engine != "native":
        token_bytes = stock_layout(source, dtype).token_bytes
        dialect = VLLM() if pool.engine == "vllm" else SGLang()
        shares = pool.worker is None or pool.worker.use_store
        stock = dialect.footprint(pool.engine_args, token_bytes, shares=shares)
        return ModelSize(_files_bytes(source), "", token_bytes, stock)
    shape = _shape(source)
    wide = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim * shape.hidden
    layer = wide + 3 * shape.hidden * shape.intermediate
    numbers = shape.layers * layer + (1 if shape.tied else 2) * shape.vocab_size * shape.hidden
    element_bytes = 1 if pool.weights == "int8" else _ELEMENT_BYTES[dtype]
    made = source.kind == "gguf" or pool.weights == "int8"  # what is made of a model's files is kept, and mapped
    shared = f"{source.path} {dtype} {pool.weights}" if made else ""
    return ModelSize(numbers * element_bytes, shared, kv_layout(source, dtype).token_bytes)


def _files_bytes(source: ModelSource) -> int:
    """Of the files that a model's weights are in; 0 where they are not here, or of no kind that is known."""
    if source.path.is_file():
        return source.path.stat().st_size
    for kind in ("*.safetensors", "*.bin", "*.gguf"):
        if files := list(source.path.glob(kind)):
            return sum(file.stat().st_size for file in files)
    return 0


def _shape(source: ModelSource) -> ModelConfig:
    try:
        return read_config(source)
    except SourceError as error:
        raise ClusterFault(str(error)) from error


def note(source: ModelSource) -> str:
    """What is to be said of a model before it is served, in a line; empty if nothing. Reads its tokenizer."""
    try:
        template = Text.load(source).template
    except SourceError:
        return ""  # who needs it will tell
    if template is None:
        return f"{source.name} has no chat template: only plain completions are possible"
    return f"{source.name}'s chat template: {template.note}" if template.note else ""
