"""The forward pass against transformers: tiny random models of each architecture, and the default model."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tracehaul.engine.attention import TiledAttention, attend_fused, attend_one
from tracehaul.engine.base import Work
from tracehaul.engine.model import Model, Segment
from tracehaul.engine.source import SourceError, resolve
from tracehaul.engine.text import Text
from tracehaul.engine.torch_engine import TorchEngine, TorchEngineConfig
from tracehaul.engine.weights import Weights, load_weights
from tracehaul.wire.steps import Sampling

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama3-rope": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=24)),
}


def logits_of(weights: Weights, tokens: list[int], chunk: int) -> torch.Tensor:
    """Logits after every token, in chunks; the sequence does not start at the pool's start."""
    shape, model = weights.config, Model(weights)
    pool = torch.full((shape.layers, 2, shape.kv_heads, len(tokens) + 9, shape.head_dim), float("nan"))
    rows: list[torch.Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            rows.append(model.forward(part, [Segment(0, len(part), 9, start)], pool, range(len(part))))
    return torch.cat(rows)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("chunk", [200, 33])
def test_logits_equal_those_of_transformers(name: str, chunk: int, tmp_path: Path) -> None:
    torch.manual_seed(11)
    make, config = MODELS[name]
    oracle: PreTrainedModel = make(config).eval()
    for parameter_name, parameter in oracle.named_parameters():
        if parameter_name.endswith(("norm.weight", ".bias")):  # not their neutral initial values
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    oracle.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 2
    tokens = torch.randint(0, 300, (101,)).tolist()
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    got = logits_of(load_weights(resolve(str(tmp_path)), torch.float32, CPU), tokens, chunk)
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()


def test_the_revision_follows_the_weights(tmp_path: Path) -> None:
    def revision(seed: int, folder: str) -> str:
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / folder)
        return load_weights(resolve(str(tmp_path / folder)), torch.bfloat16, CPU).revision

    assert revision(1, "a") == revision(1, "b")
    assert revision(1, "a") != revision(2, "c")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"num_hidden_layers": 4}, "lack"),
        ({"intermediate_size": 113}, "shape"),
    ],
)
def test_what_would_run_wrongly_is_refused_by_name(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(SourceError, match=reason):
        load_weights(resolve(str(tmp_path)), torch.float32, CPU)


@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (1, 700), (40, 40), (300, 300), (300, 1100), (17, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ways_to_attend_agree(tokens: int, context: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    keys, values = torch.randn(2, 3, context + 50, 64, dtype=dtype)[:, :, 20 : context + 20].unbind(0)
    queries = torch.randn(tokens, 12, 64, dtype=dtype)[:, :9]
    expected = attend_fused(queries.float(), keys.float(), values.float())
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert (TiledAttention(dtype)(queries, keys, values) - expected).abs().max() < bound
    assert (attend_one(queries[-1:], keys, values) - expected[-1:]).abs().max() < bound


def oracle_of(weights: Weights) -> LlamaForCausalLM:
    """transformers' model on views of the same weights."""
    c = weights.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden,
        intermediate_size=c.intermediate,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        max_position_embeddings=c.context_max,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    for at, layer in enumerate(weights.layers):
        q, k, v = layer.qkv.split([c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim])
        gate, up = layer.gate_up.chunk(2)
        named = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.out,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down,
            "input_layernorm": layer.attention_norm,
            "post_attention_layernorm": layer.mlp_norm,
        }
        state |= {f"model.layers.{at}.{name}.weight": tensor for name, tensor in named.items()}
    state["lm_head.weight"] = weights.head
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is no parameter: still on meta
    return model.eval()


@pytest.mark.slow
def test_the_default_model_says_what_transformers_says() -> None:
    source = resolve()
    text = Text.load(source)
    questions = ["What is the largest planet?", "Write a Python function that adds 12 and 345.", "Erzähl mir was 😀"]
    prompts = [text.encode(text.render([{"role": "user", "content": question}])) for question in questions]

    async def ours() -> list[list[int]]:
        engine = await TorchEngine.load(TorchEngineConfig(dtype="float32", threads=1, kv_tokens_max=512))
        greedy = Sampling(max_tokens=24, temperature=0.0)
        sequences = [engine.open(len(prompt) + 24) for prompt in prompts]
        feed, output = list(prompts), [list[int]() for _ in prompts]
        for _ in range(24):
            found = await engine.run(
                [Work(s, tokens, greedy) for s, tokens in zip(sequences, feed, strict=True) if s is not None]
            )
            for at, result in enumerate(found):
                assert result.token is not None
                output[at].append(result.token)
                feed[at] = [result.token]
        await engine.aclose()
        return output

    output = asyncio.run(ours())
    oracle = oracle_of(load_weights(source, torch.float32, CPU))
    for prompt, got in zip(prompts, output, strict=True):
        with torch.inference_mode():
            # Teacher-forced: at each place the oracle, having seen our tokens so far, must choose ours too.
            logits = oracle(torch.tensor([prompt + got])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == got


@pytest.mark.gpu
def test_a_gpu_says_what_the_cpu_says(tmp_path: Path) -> None:
    torch.manual_seed(4)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)

    async def output(device: str) -> list[int | None]:
        config = TorchEngineConfig(
            model=str(tmp_path), device=device, dtype="float32", kv_tokens_max=256, block_tokens=16
        )
        engine = await TorchEngine.load(config)
        sequence = engine.open(200)
        assert sequence is not None
        tokens, found = list(range(60)), list[int | None]()
        for _ in range(20):
            (result,) = await engine.run([Work(sequence, tokens, Sampling(max_tokens=20, temperature=0.0))])
            assert result.token is not None
            found.append(result.token)
            tokens = [result.token]
        await engine.aclose()
        return found

    assert asyncio.run(output("cuda")) == asyncio.run(output("cpu"))
