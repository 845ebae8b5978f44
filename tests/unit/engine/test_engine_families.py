"""Every model family and variant against transformers: tiny random checkpoints, sharded, logits and greedy tokens."""

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tracehaul.engine.model import Model, Segment
from tracehaul.engine.weights import Weights, load_weights
from tracehaul.model.source import SourceError, resolve

CPU = torch.device("cpu")
TOKENS = 101
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None, None, None]:
    """Tiny matrices on busy cores: threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))


def mistral(**changes: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**{**SHAPE, "sliding_window": None, **changes}))


def qwen2(**changes: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, **changes}))


def qwen3(**changes: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "head_dim": 24, **changes}))


def smollm3(**changes: Any) -> PreTrainedModel:
    return SmolLM3ForCausalLM(SmolLM3Config(**{**SHAPE, **changes}))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama2": lambda: llama(num_key_value_heads=6),
    "llama2-linear": lambda: llama(num_key_value_heads=6, rope_parameters=LINEAR),
    "llama3": lambda: llama(rope_parameters=LLAMA3, vocab_size=320),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: llama(head_dim=32, num_attention_heads=4),
    "llama-dynamic": lambda: llama(rope_parameters=DYNAMIC),
    "mistral": lambda: mistral(head_dim=32, num_attention_heads=4),
    "mistral-window": lambda: mistral(sliding_window=17),
    "mistral-window-1": lambda: mistral(sliding_window=1, tie_word_embeddings=True),
    "mistral-window-untouched": lambda: mistral(sliding_window=4096),
    "qwen2": lambda: qwen2(),
    "qwen2-window": lambda: qwen2(use_sliding_window=True, sliding_window=30, max_window_layers=1),
    "qwen2-tied": lambda: qwen2(tie_word_embeddings=True),
    "qwen2.5-yarn": lambda: qwen2(rope_parameters=YARN),
    "yarn-mscale": lambda: llama(rope_parameters={**YARN, "mscale": 0.8, "mscale_all_dim": 1.2, "truncate": False}),
    "yarn-betas": lambda: llama(rope_parameters={**YARN, "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0}),
    "qwen3": lambda: qwen3(),
    "qwen3-biases": lambda: qwen3(attention_bias=True, tie_word_embeddings=True),
    "qwen3-window": lambda: qwen3(
        use_sliding_window=True,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "smollm3-window": lambda: smollm3(num_hidden_layers=4, use_sliding_window=True, sliding_window=25),
    "smollm3": lambda: smollm3(num_hidden_layers=4),
    "smollm3-listed": lambda: smollm3(no_rope_layers=[0, 1, 0], attention_bias=True, tie_word_embeddings=False),
}


def saved(make: Callable[[], PreTrainedModel], folder: Path, seed: int = 11) -> PreTrainedModel:
    """A random model, its checkpoint in ``folder`` in several files."""
    torch.manual_seed(seed)
    oracle = make().eval()
    for name, parameter in oracle.named_parameters():
        if name.endswith(("norm.weight", ".bias")):  # not their neutral initial values
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    oracle.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) >= 2
    return oracle


def expected_logits(oracle: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return oracle(torch.tensor([tokens])).logits[0]


def logits_of(weights: Weights, tokens: list[int], cuts: list[int]) -> torch.Tensor:
    """Logits after every token, in chunks; the sequence does not start at the pool's start."""
    shape, model = weights.config, Model(weights)
    pool = torch.full(
        (shape.layers, 2, shape.kv_heads, len(tokens) + 9, shape.head_dim), float("nan"), dtype=weights.embedding.dtype
    )
    rows: list[torch.Tensor] = []
    with torch.inference_mode():
        for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
            part = tokens[start:end]
            rows.append(model.forward(part, [Segment(0, len(part), 9, start)], pool, range(len(part))))
    return torch.cat(rows)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()
    assert torch.equal(got.argmax(-1), expected.argmax(-1))  # greedy tokens


@pytest.mark.parametrize("name", sorted(MODELS))
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    oracle = saved(MODELS[name], tmp_path)
    tokens = torch.randint(0, 300, (TOKENS,)).tolist()
    expected = expected_logits(oracle, tokens)
    weights = load_weights(resolve(str(tmp_path)), torch.float32, CPU)
    for cuts in ([], [33, 66, 99], [60, *range(61, TOKENS)]):  # at once, in chunks, decoded token by token
        assert_close(logits_of(weights, tokens, cuts), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_checkpoint_is_its_own_values_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    saved(lambda: llama().to(dtype), tmp_path)
    oracle = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, 300, (TOKENS,)).tolist()
    weights = load_weights(resolve(str(tmp_path)), torch.float32, CPU)
    assert_close(logits_of(weights, tokens, [50]), expected_logits(oracle, tokens))


@pytest.mark.parametrize("name", ["llama3", "mistral-window", "qwen3-biases", "smollm3"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_half_precision_stays_near_float32(name: str, dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    oracle = saved(MODELS[name], tmp_path)
    tokens = torch.randint(0, 300, (TOKENS,)).tolist()
    got = logits_of(load_weights(resolve(str(tmp_path)), dtype, CPU), tokens, [40, *range(90, TOKENS)])
    expected = expected_logits(oracle, tokens)
    assert (got - expected).abs().mean() < bound * expected.abs().mean()


def test_dynamic_ntk_past_the_trained_context_decodes_as_transformers_does(tmp_path: Path) -> None:
    oracle = saved(lambda: llama(rope_parameters=DYNAMIC, max_position_embeddings=64), tmp_path)
    tokens = torch.randint(0, 300, (TOKENS,)).tolist()
    weights = load_weights(resolve(str(tmp_path)), torch.float32, CPU)
    assert weights.config.context_max == 128
    with torch.inference_mode():
        whole = oracle(torch.tensor([tokens[:64]]), use_cache=True)
        expected, cache = [whole.logits[0]], whole.past_key_values
        for token in tokens[64:]:
            step = oracle(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            expected.append(step.logits[0])
    for cuts in ([64], [30, 90], list(range(64, TOKENS))):  # chunks are not to be seen
        assert_close(logits_of(weights, tokens, cuts), torch.cat(expected))


def change_config(folder: Path, change: dict[str, Any]) -> None:
    file = folder / "config.json"
    raw = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LINEAR, {**DYNAMIC, "factor": 4.0}])
def test_older_configs_say_the_same(rope: dict[str, Any], tmp_path: Path) -> None:
    saved(lambda: llama(rope_parameters=rope), tmp_path)
    new = load_weights(resolve(str(tmp_path)), torch.float32, CPU)
    older = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    change_config(
        tmp_path,
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": {"type": rope["rope_type"], **older}},
    )
    assert load_weights(resolve(str(tmp_path)), torch.float32, CPU).config == new.config


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "gelu"}, "activation gelu is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config in its config is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type longrope is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["chunked_attention"]},
            "layer type chunked_attention is not supported",
        ),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"num_attention_heads": "many"}, "does not make sense"),
        ({"num_attention_heads": 5}, "heads"),
        ({"architectures": ["FalconForCausalLM"]}, "architecture FalconForCausalLM is not supported"),
    ],
)
def test_what_would_run_wrongly_is_refused_by_name_before_any_weight_is_read(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = {**LlamaConfig(**SHAPE).to_dict(), "architectures": ["LlamaForCausalLM"], **change}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(SourceError, match=reason) as caught:
        resolve(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"), [({"num_hidden_layers": 4}, "lack"), ({"intermediate_size": 113}, "shape")]
)
def test_weights_that_do_not_fit_the_config_are_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    saved(llama, tmp_path)
    change_config(tmp_path, change)
    with pytest.raises(SourceError, match=reason):
        load_weights(resolve(str(tmp_path)), torch.float32, CPU)
