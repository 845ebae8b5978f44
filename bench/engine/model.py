"""The default model as a folder in the hub's layout, for engines that read no GGUF: the very weights that ours runs."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tracehaul.engine.weights import ModelConfig, Weights, load_weights
from tracehaul.model.source import default_cache_dir, resolve
from tracehaul.model.text import Text


def hub_folder() -> Path:
    """The folder, in the user's cache; written once per revision of the weights."""
    source = resolve()
    weights = load_weights(source, torch.bfloat16, torch.device("cpu"))
    folder = default_cache_dir() / f"hub-{weights.revision}-2"
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_tensors(weights), folder / "model.safetensors", metadata={"format": "pt"})
        text = Text.load(source)
        (folder / "tokenizer.json").write_text(text.serialized())
        says = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": text.chat_template}
        (folder / "tokenizer_config.json").write_text(json.dumps(says))
        # Last, and in one step: a folder with a config is complete.
        (folder / "config.json.part").write_text(json.dumps(_config(weights.config), indent=1))
        (folder / "config.json.part").replace(folder / "config.json")
    return folder


def _config(shape: ModelConfig) -> dict[str, object]:
    assert shape.tied
    assert shape.rope_scaling is None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context_max,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _tensors(weights: Weights) -> dict[str, torch.Tensor]:
    """Fused matrices taken apart again, under the hub's names."""
    c = weights.config
    heads = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
    tensors = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    for at, layer in enumerate(weights.layers):
        query, key, value = layer.qkv.split(heads)
        gate, up = layer.gate_up.split(c.intermediate)
        parts = {
            "input_layernorm": layer.attention_norm,
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": layer.out,
            "post_attention_layernorm": layer.mlp_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down,
        }
        tensors |= {f"model.layers.{at}.{name}.weight": tensor for name, tensor in parts.items()}
    return {name: tensor.to(torch.bfloat16).contiguous().clone() for name, tensor in tensors.items()}
