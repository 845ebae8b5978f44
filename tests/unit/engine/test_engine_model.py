"""The forward pass: its ways to attend, a GPU's tokens, and the default model against transformers."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tracehaul.engine.attention import TiledAttention, attend_fused, attend_one
from tracehaul.engine.base import Work
from tracehaul.engine.torch_engine import TorchEngine, TorchEngineConfig
from tracehaul.engine.weights import Weights, load_weights
from tracehaul.model.source import SourceError, resolve
from tracehaul.model.text import Text
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


def test_the_revision_follows_the_weights(tmp_path: Path) -> None:
    def revision(seed: int, folder: str, *, int8: bool = False) -> str:
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / folder)
        return load_weights(resolve(str(tmp_path / folder)), torch.bfloat16, CPU, int8=int8).revision

    assert revision(1, "a") == revision(1, "b")
    assert revision(1, "a") != revision(2, "c")
    assert revision(1, "a") != revision(1, "a", int8=True)


def test_int8_weights_are_refused_where_no_kernel_reads_them(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    config = TorchEngineConfig(model=str(tmp_path), dtype="float16", device="cpu", weights="int8", kv_tokens_max=64)
    with pytest.raises(SourceError, match="int8"):
        asyncio.run(TorchEngine.load(config))


@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (1, 700), (40, 40), (300, 300), (300, 1100), (17, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 50, 400])
def test_the_ways_to_attend_agree(tokens: int, context: int, dtype: torch.dtype, window: int | None) -> None:
    torch.manual_seed(2)
    keys, values = torch.randn(2, 3, context + 50, 64, dtype=dtype)[:, :, 20 : context + 20].unbind(0)
    queries = torch.randn(tokens, 12, 64, dtype=dtype)[:, :9]
    expected = attend_fused(queries.float(), keys.float(), values.float(), window)
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert (TiledAttention(dtype)(queries, keys, values, window) - expected).abs().max() < bound
    assert (attend_one(queries[-1:], keys, values, window) - expected[-1:]).abs().max() < bound


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
