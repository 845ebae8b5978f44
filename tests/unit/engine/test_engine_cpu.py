"""The compiled forward pass: equal to transformers', and to itself however work is cut, shared and threaded."""

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
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
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tracehaul.engine.base import CutShort
from tracehaul.engine.cpu.host_model import HostModel, is_supported
from tracehaul.engine.cpu.team import Team
from tracehaul.engine.model import Model, Segment
from tracehaul.engine.weights import Weights, load_weights
from tracehaul.model.source import resolve
from tracehaul.runtime import clock

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 266,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "groups-of-3": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "groups-of-4": lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_attention_heads": 8, "head_dim": 64})),
    "no-groups": lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 6, "head_dim": 96})),
    "biases": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "num_attention_heads": 3, "num_key_value_heads": 1})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SHAPE, no_rope_layers=[1, 0, 1])),
}
TOKENS = 1100
"""Over two spans of keys and into the third."""


def loaded(
    make: Callable[[], PreTrainedModel], folder: Path, dtype: torch.dtype, *, int8: bool = False
) -> tuple[PreTrainedModel, Weights]:
    torch.manual_seed(11)
    oracle = make().eval()
    for name, parameter in oracle.named_parameters():
        if name.endswith(("norm.weight", ".bias")):  # not their neutral initial values
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    oracle.save_pretrained(folder)
    return oracle, load_weights(resolve(str(folder)), dtype, CPU, int8=int8)


def empty_pool(weights: Weights, tokens: int) -> torch.Tensor:
    """Whatever is read before it is written shows."""
    c = weights.config
    shape = (c.layers, 2, c.kv_heads, tokens, c.head_dim)
    return torch.full(shape, float("nan"), dtype=weights.dtype)


def some_tokens(count: int) -> list[int]:
    return torch.randint(0, SHAPE["vocab_size"], (count,), generator=torch.Generator().manual_seed(3)).tolist()


def in_chunks(
    model: HostModel | Model, tokens: Sequence[int], cuts: Sequence[int], pool: torch.Tensor, base: int
) -> torch.Tensor:
    """Logits after every token."""
    rows: list[torch.Tensor] = []
    with torch.inference_mode():
        for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
            part = tokens[start:end]
            rows.append(model.forward(part, [Segment(0, len(part), base, start)], pool, range(len(part))).clone())
    return torch.cat(rows)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    oracle, weights = loaded(MODELS[name], tmp_path, torch.float32)
    assert is_supported(weights.config, torch.float32)
    tokens = some_tokens(TOKENS)
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    with closing(HostModel(weights, 2)) as model:
        got = in_chunks(model, tokens, [TOKENS - 20], empty_pool(weights, TOKENS + 40), 9)
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()


def round_matrices(model: PreTrainedModel) -> None:
    """To what int8 with a scale for each row can say."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                # The row of a padding token is all zeros.
                step = parameter.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
                parameter.copy_((parameter / step).round() * step)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_with_int8_weights_logits_equal_those_of_transformers_with_the_same_numbers(name: str, tmp_path: Path) -> None:
    oracle, weights = loaded(MODELS[name], tmp_path, torch.float32, int8=True)
    assert {weights.embedding.dtype, weights.head.dtype, weights.layers[0].down.dtype} == {torch.int8}
    round_matrices(oracle)
    tokens = some_tokens(TOKENS)
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    with closing(HostModel(weights, 2)) as model:
        got = in_chunks(model, tokens, [TOKENS - 20], empty_pool(weights, TOKENS + 40), 9)
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_weights_to_int8_leaves_the_logits_near(dtype: torch.dtype, tmp_path: Path) -> None:
    oracle, weights = loaded(MODELS["groups-of-3"], tmp_path, dtype, int8=True)
    tokens = some_tokens(200)
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    with closing(HostModel(weights, 2)) as model:
        error = in_chunks(model, tokens, [100], empty_pool(weights, 200), 0) - expected
    # Random weights make a chaos of small changes: here the rounding of weights alone comes to a tenth.
    assert error.square().mean() < 0.15**2 * expected.square().mean()


KINDS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]


@pytest.fixture(scope="module", params=KINDS, ids=("float32", "bfloat16", "int8"))
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    dtype, int8 = request.param
    _, found = loaded(MODELS["groups-of-3"], tmp_path_factory.mktemp("model"), dtype, int8=int8)
    return found


def test_cutting_a_prompt_changes_no_bit(weights: Weights) -> None:
    tokens = some_tokens(TOKENS)
    pool, other = empty_pool(weights, 2 * TOKENS), empty_pool(weights, 2 * TOKENS)
    with closing(HostModel(weights, 2)) as model:
        expected = in_chunks(model, tokens, [], pool, 0)
        for cuts in ([512], [1, 34, 50, 511, 513, 900], list(range(TOKENS - 30, TOKENS))):
            assert torch.equal(in_chunks(model, tokens, cuts, other, 77), expected)
            assert torch.equal(other[:, :, :, 77 : 77 + TOKENS], pool[:, :, :, :TOKENS])


def test_sharing_an_iteration_changes_no_bit(weights: Weights) -> None:
    tokens, ends = some_tokens(TOKENS), (1, 40, 600, 1099)
    with closing(HostModel(weights, 2)) as model:
        pool = empty_pool(weights, TOKENS)
        expected = in_chunks(model, tokens, [], pool, 0)
        shared = empty_pool(weights, len(ends) * TOKENS)
        for at in range(len(ends)):
            shared[:, :, :, at * TOKENS : (at + 1) * TOKENS] = pool
        # A token of each, and a chunk of 80 more among them.
        segments = [Segment(at, 1, at * TOKENS, end) for at, end in enumerate(ends[:2])]
        segments += [Segment(2, 80, 2 * TOKENS, 520), Segment(82, 1, 3 * TOKENS, 1099)]
        batch = [tokens[1], tokens[40], *tokens[520:600], tokens[1099]]
        with torch.inference_mode():
            got = model.forward(batch, segments, shared, [0, 1, 81, 82])
    assert torch.equal(got, expected[[1, 40, 599, 1099]])


def test_a_pass_that_is_cut_short_changes_no_bit(weights: Weights) -> None:
    tokens, pool, cuts = some_tokens(TOKENS), empty_pool(weights, TOKENS), 0
    with closing(HostModel(weights, 2)) as model:
        began_s = clock.perf_s()
        expected = in_chunks(model, tokens, [], pool, 0)
        took_s = clock.perf_s() - began_s
        for at in range(20):
            timer = threading.Timer(at / 20 * took_s, model.cut)
            timer.start()
            try:
                assert torch.equal(in_chunks(model, tokens, [], pool, 0), expected)
            except CutShort:
                cuts += 1
            timer.join()
            assert torch.equal(in_chunks(model, tokens, [], pool, 0), expected)
    assert cuts


def test_the_number_of_threads_changes_no_bit(weights: Weights) -> None:
    tokens = some_tokens(300)
    found: list[torch.Tensor] = []
    for threads in (1, 3):
        with closing(HostModel(weights, threads)) as model:
            found.append(in_chunks(model, tokens, [290], empty_pool(weights, 400), 50))
    assert torch.equal(*found)


def test_bfloat16_is_as_close_to_float32_as_torch_is(tmp_path: Path) -> None:
    oracle, weights = loaded(MODELS["groups-of-3"], tmp_path, torch.bfloat16)
    oracle = oracle.bfloat16().float()  # the same values
    tokens = some_tokens(200)
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    with closing(HostModel(weights, 2)) as model:
        ours = in_chunks(model, tokens, [100], empty_pool(weights, 200), 0) - expected
    torchs = in_chunks(Model(weights), tokens, [100], empty_pool(weights, 200), 0) - expected
    assert ours.square().mean() < 1.1 * torchs.square().mean()


def test_a_token_outside_the_vocabulary_is_refused(weights: Weights) -> None:
    with closing(HostModel(weights, 1)) as model:
        for token in (-1, SHAPE["vocab_size"]):
            with pytest.raises(IndexError, match="vocabulary"):
                model.forward([token], [Segment(0, 1, 0, 0)], empty_pool(weights, 32), [0])


def test_other_shapes_are_left_to_torch(weights: Weights) -> None:
    assert not is_supported(weights.config, torch.float16)


def test_a_team_runs_on_each_of_its_threads() -> None:
    team = Team(3, 64)
    places: list[int] = []
    team.run(places.append)
    team.close()
    assert len(set(places)) == 3


def test_a_helpers_error_is_not_lost() -> None:
    team = Team(2, 64)

    def fail(place: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("in a helper")

    team.run(fail)
    with pytest.raises(ValueError, match="in a helper"):
        team.settle()
    team.close()
