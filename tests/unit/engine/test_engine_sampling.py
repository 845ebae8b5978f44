"""Sampling: right distribution, right rules, and nothing but (seed, position, history) behind it."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracehaul.engine import sampling as module
from tracehaul.engine.base import Result
from tracehaul.engine.history import History
from tracehaul.engine.sampling import Row, choose, uniform
from tracehaul.wire.steps import Sampling

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], dtype=np.float32))


def sample(logits: Any, sampling: Sampling, position: int, emitted: int = 0, history: History | None = None) -> int:
    (result,) = choose(np.asarray(logits, np.float32)[None], [Row(sampling, position, emitted, history)])
    assert result.token is not None
    return result.token


def draws(count: int = 4000, logits: Any = LOGITS, **rules: Any) -> np.ndarray:
    sampling = Sampling(max_tokens=1, **{"seed": 3, **rules})
    found = [sample(logits, sampling, position) for position in range(count)]
    return np.bincount(found, minlength=len(logits)) / count


def test_the_uniform_numbers_are_fixed_for_ever() -> None:
    # Tokens of a step that moved between versions must not change: these values are a contract.
    assert [uniform(0, 0), uniform(1, 2), uniform(-1, 5)] == [
        0.044677981169000125,
        0.49595034048200115,
        0.7437167741896846,
    ]
    numbers = np.array([uniform(9, at) for at in range(4000)])
    assert 0.0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1.0
    assert abs(numbers.mean() - 0.5) < 0.02


def test_frequencies_follow_the_softmax() -> None:
    assert np.abs(draws() - np.exp(LOGITS)).max() < 0.03


def test_temperature_sharpens() -> None:
    expected = np.exp(LOGITS / 0.5) / np.exp(LOGITS / 0.5).sum()
    assert np.abs(draws(temperature=0.5) - expected).max() < 0.03


def test_cuts_renormalize() -> None:
    assert np.abs(draws(top_k=2) - np.array([0, 0.4, 0, 0.25, 0]) / 0.65).max() < 0.03
    assert np.abs(draws(top_p=0.7) - np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85).max() < 0.03
    assert np.abs(draws(min_p=0.3) - np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85).max() < 0.03
    assert draws(top_p=1e-9)[1] == 1.0
    assert draws(top_k=1)[1] == 1.0
    # top_p is a share of what top_k left: 0.4 is 62% of the two likeliest.
    assert draws(top_k=2, top_p=0.6)[1] == 1.0
    # min_p is a share of the likeliest, after temperature.
    assert draws(200, temperature=0.1, min_p=0.3)[1] == 1.0


def test_greedy_takes_the_first_of_equals() -> None:
    assert sample([0, 3, 1, 3], Sampling(max_tokens=1, temperature=0.0), 5) == 1


def test_the_smallest_temperatures_are_greedy() -> None:
    assert draws(20, temperature=1e-300)[1] == 1.0
    assert draws(20, temperature=2e-5)[1] == 1.0


# --- against an obvious reference ---------------------------------------------------------------------------


def slowly(logits: list[float], sampling: Sampling, u: float, seen: list[int], output: list[int]) -> int:
    """The rules one by one, in plain Python."""
    logits = list(logits)
    for token in set(seen + output):
        value = logits[token]
        logits[token] = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
    for token in set(output):
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    if len(output) < sampling.min_tokens:
        for token in sampling.stop_tokens:
            logits[token] = -math.inf
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if sampling.temperature == 0:
        return order[0]
    peak = logits[order[0]]
    kept = [(token, math.exp((logits[token] - peak) / sampling.temperature)) for token in order]
    kept = [(token, weight) for token, weight in kept if weight >= sampling.min_p and weight > 0]
    kept = kept[: sampling.top_k] if sampling.top_k else kept
    total, mass, inside = sum(weight for _, weight in kept), 0.0, list[tuple[int, float]]()
    for token, weight in kept:
        if sampling.top_p == 1.0 or mass < sampling.top_p * total:
            inside.append((token, weight))
        mass += weight
    left = u * sum(weight for _, weight in inside)
    for token, weight in inside:
        left -= weight
        if left < 0:
            return token
    return inside[-1][0]


# Coarse, so that ties are common and rounding decides nothing: weights of equals are equal in any precision.
coarse = st.integers(-12, 12).map(lambda quarter: quarter / 4)
rules = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7]),
        "top_p": st.sampled_from([1.0, 0.93, 0.51, 0.0101]),
        "top_k": st.sampled_from([0, 1, 2, 5, 100]),
        "min_p": st.sampled_from([0.0, 0.0503, 0.31]),
        "repetition_penalty": st.sampled_from([1.0, 2.0, 0.5]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.25, 1.5]),
        "logit_bias": st.dictionaries(st.integers(0, 11), st.sampled_from([-100.0, 5.0, 0.5]), max_size=3).map(
            lambda bias: tuple(bias.items())
        ),
        "min_tokens": st.integers(0, 4),
        "stop_tokens": st.sampled_from([(), (1,), (3, 4)]),
    }
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(coarse, min_size=12, max_size=12),
    rules,
    st.lists(st.integers(0, 11), max_size=6),
    st.lists(st.integers(0, 11), max_size=6),
    st.integers(0, 50),
)
def test_the_rules_are_those_of_the_reference(
    logits: list[float], rules: dict[str, Any], prompt: list[int], output: list[int], position: int
) -> None:
    sampling = Sampling(max_tokens=9, seed=1, **rules)
    history = History.of(sampling, prompt + output[:2], len(output[:2]))
    assert (history is None) == (not sampling.penalizes)
    for token in output[2:]:
        if history is not None:
            history.add(token)
    got = sample(logits, sampling, position, len(output), history)
    assert got == slowly(logits, sampling, uniform(1, position), prompt, output)


@pytest.mark.parametrize(
    "rules", [{}, {"top_p": 0.999999}, {"top_p": 0.9}, {"top_k": 900}, {"top_k": 40}, {"min_p": 0.001}]
)
@pytest.mark.parametrize("spread", [1.0, 6.0])
@pytest.mark.slow
def test_the_short_cut_changes_nothing(rules: dict[str, Any], spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Coarse logits, so that ties lie across the cut; nearly flat, so that it is often not enough.
    logits = np.round(np.random.default_rng(1).normal(0, spread, 40_000), 1).astype(np.float32)
    sampling = Sampling(max_tokens=1, seed=4, logprobs=5, **rules)
    rows = [Row(sampling, position, 0) for position in range(60)]
    quick = choose(np.tile(logits, (60, 1)), rows)
    monkeypatch.setattr(module, "_shallow", lambda depths, count: None)
    assert choose(np.tile(logits, (60, 1)), rows) == quick


def test_a_row_is_decided_by_itself_alone() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 3, (6, 500)).astype(np.float32)
    history = History([1, 2], [3, 3])
    rows = [
        Row(Sampling(max_tokens=9, temperature=0.0), 3, 0),
        Row(Sampling(max_tokens=9, seed=5), 4, 0),
        Row(Sampling(max_tokens=9, temperature=0.0, logprobs=3), 5, 1),
        Row(Sampling(max_tokens=9, temperature=0.0, frequency_penalty=1.0), 6, 1, history),
        Row(Sampling(max_tokens=9, temperature=0.0, min_tokens=3, stop_tokens=(int(logits[4].argmax()),)), 7, 1),
        Row(Sampling(max_tokens=9, seed=6, top_p=0.5, logit_bias=((7, 100.0),)), 8, 1),
    ]
    before = logits.copy()
    together = choose(logits, rows)
    assert (logits == before).all(), "the caller's logits stay as they are"
    for at in range(len(rows)):
        assert choose(logits[at : at + 1], rows[at : at + 1]) == [together[at]]
    assert together[0] == Result(int(logits[0].argmax()))
    assert together[5].token == 7


# --- what changes a row -------------------------------------------------------------------------------------


def test_masked_stop_tokens_are_never_drawn() -> None:
    sampling = Sampling(max_tokens=9, seed=1, stop_tokens=(1, 3, 77), min_tokens=2)
    assert {sample(LOGITS, sampling, position, 1) for position in range(300)} == {0, 2, 4}
    assert {sample(LOGITS, sampling, position, 2) for position in range(300)} == {0, 1, 2, 3, 4}


def test_no_bias_lifts_a_mask() -> None:
    sampling = Sampling(max_tokens=9, temperature=0.0, stop_tokens=(1,), min_tokens=2, logit_bias=((1, 100.0),))
    assert sample(LOGITS, sampling, 5, 0) != 1
    assert sample(LOGITS, sampling, 5, 2) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=30), st.lists(st.integers(0, 300), max_size=300), st.integers(0, 30))
def test_a_history_that_grew_is_one_counted_at_once(prompt: list[int], output: list[int], split: int) -> None:
    grown = History(prompt, output[:split])
    for token in output[split:]:
        grown.add(token)
    assert dict(zip(grown.ids.tolist(), grown.counts.tolist(), strict=True)) == {
        token: output.count(token) for token in {*prompt, *output}
    }


def test_only_the_repetition_penalty_looks_at_the_prompt() -> None:
    counted = History.of(Sampling(max_tokens=9, presence_penalty=1.0), [1, 2, 3, 4], 2)
    assert counted is not None
    assert counted.ids.tolist() == [3, 4]
    counted = History.of(Sampling(max_tokens=9, repetition_penalty=1.1), [1, 2, 3, 4], 2)
    assert counted is not None
    assert counted.ids.tolist() == [1, 2, 3, 4]


# --- logprobs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_logprobs_are_those_of_the_untouched_logits(spread: float) -> None:
    logits = np.random.default_rng(3).normal(0, spread, 2000).astype(np.float32)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    touching = Sampling(
        max_tokens=9, temperature=0.3, seed=2, frequency_penalty=1.5, logit_bias=((9, 100.0),), logprobs=20
    )
    (result,) = choose(logits[None], [Row(touching, 4, 0, History((), [5]))])
    assert result.logprobs is not None
    assert result.token == 9
    assert abs(result.logprobs.logprob - expected[9]) < 1e-5
    order = sorted(range(2000), key=lambda token: (-logits[token], token))[:20]
    assert [token for token, _ in result.logprobs.top] == order
    assert np.abs(np.array([value for _, value in result.logprobs.top]) - expected[order]).max() < 1e-5


def test_none_of_the_likeliest_may_be_asked_for() -> None:
    (result,) = choose(LOGITS[None], [Row(Sampling(max_tokens=1, temperature=0.0, logprobs=0), 1, 0)])
    assert result.logprobs is not None
    assert result.logprobs.top == ()
    assert abs(result.logprobs.logprob - math.log(0.4)) < 1e-6
