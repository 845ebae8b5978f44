"""Sampling: right distribution, right rules, and nothing but (seed, position) behind it."""

from typing import Any

import numpy as np
import pytest

from tracehaul.engine import sampling as module
from tracehaul.engine.sampling import sample, uniform
from tracehaul.wire.steps import Sampling

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], dtype=np.float32))


def draws(count: int = 4000, logits: Any = LOGITS, **rules: Any) -> np.ndarray:
    sampling = Sampling(max_tokens=1, **{"seed": 3, **rules})
    found = [sample(logits, sampling, position, 0) for position in range(count)]
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


def test_top_k_and_top_p_cut_and_renormalize() -> None:
    assert np.abs(draws(top_k=2) - np.array([0, 0.4, 0, 0.25, 0]) / 0.65).max() < 0.03
    assert np.abs(draws(top_p=0.7) - np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85).max() < 0.03
    assert draws(top_p=1e-9)[1] == 1.0
    assert draws(top_k=1)[1] == 1.0
    # top_p is a share of what top_k left: 0.4 is 62% of the two likeliest.
    assert draws(top_k=2, top_p=0.6)[1] == 1.0


def test_greedy_takes_the_first_of_equals() -> None:
    assert sample(np.array([0, 3, 1, 3], np.float32), Sampling(max_tokens=1, temperature=0.0), 5, 0) == 1


def test_the_smallest_temperature_is_greedy() -> None:
    assert draws(20, temperature=1e-300)[1] == 1.0


@pytest.mark.parametrize("rules", [{}, {"top_p": 0.999999}, {"top_p": 0.9}, {"top_k": 900}, {"top_k": 40}])
def test_the_short_cut_changes_nothing(rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Coarse logits, so that ties lie across the cut; nearly flat, so that it is often not enough.
    logits = np.round(np.random.default_rng(1).normal(0, 1.0, 3000), 1).astype(np.float32)
    sampling = Sampling(max_tokens=1, seed=4, **rules)
    quick = [sample(logits, sampling, position, 0) for position in range(200)]
    monkeypatch.setattr(module, "_CANDIDATES", ())
    assert [sample(logits, sampling, position, 0) for position in range(200)] == quick


def test_masked_stop_tokens_are_never_drawn() -> None:
    sampling = Sampling(max_tokens=9, seed=1, stop_tokens=(1, 3, 77), min_tokens=2)
    assert {sample(LOGITS, sampling, position, 1) for position in range(300)} == {0, 2, 4}
    assert {sample(LOGITS, sampling, position, 2) for position in range(300)} == {0, 1, 2, 3, 4}
