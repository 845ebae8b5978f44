"""How right the times are that refused traces are told: agents on a full fleet, four times as many of them at once."""

import heapq
import math
import random
from collections.abc import Callable
from statistics import median

import pytest

from router.policy.admission import Admission, AdmissionConfig, Memory

AGENTS, OVERLOAD, STEPS = 14, 4, 8
FIRST_TOKENS, MORE_TOKENS, ANSWER_TOKENS = 300, 80, 24
KV_TOKENS = 16_384
CALM_S, ENDS_S = 40.0, 160.0


class Fleet:
    """As :mod:`bench.overload` has it; steps take from so long to so long."""

    def __init__(self, seed: int, step_s: tuple[float, float]) -> None:
        self._admission = Admission(AdmissionConfig())
        self._admission.resize(Memory(KV_TOKENS, 1e6))
        self._dice = random.Random(seed)
        self._step_s = step_s
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0
        self.errors: list[float] = []

    def run(self) -> None:
        for agent in range(AGENTS * OVERLOAD):
            self._at(0.0 if agent < AGENTS else CALM_S, self._trace)
        while self._events:
            now_s, _, act = heapq.heappop(self._events)
            act(now_s)

    def _at(self, at_s: float, act: Callable[[float], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (at_s, self._count, act))

    def _trace(self, began_s: float) -> None:
        key, told_s = object(), math.inf

        def ask(now_s: float) -> None:
            nonlocal told_s
            if now_s > ENDS_S:
                return
            refusal = self._admission.ask(key, now_s)
            if refusal is None:
                if told_s < math.inf:
                    self.errors.append(abs(told_s / max(now_s - began_s, 0.1) - 1))
                self._step(key, 1, now_s)
                return
            told_s = refusal.start_s if told_s == math.inf else told_s
            self._at(now_s + max(1, math.ceil(refusal.retry_s)), ask)

        ask(began_s)

    def _step(self, key: object, step: int, now_s: float) -> None:
        tokens = FIRST_TOKENS + (step - 1) * (MORE_TOKENS + ANSWER_TOKENS)
        self._admission.begins(key, tokens, now_s)
        rest_s = self._dice.uniform(0.5, 1.5)

        def end(now_s: float) -> None:
            self._admission.ends(key, tokens + ANSWER_TOKENS, now_s)
            if step < STEPS:
                self._at(now_s + rest_s, lambda now_s: self._step(key, step + 1, now_s))
            else:
                self._admission.over(key, now_s)
                self._at(now_s + rest_s, self._trace)

        self._at(now_s + self._dice.uniform(*self._step_s), end)


@pytest.mark.parametrize("step_s", [(0.6, 0.6), (1.0, 1.0), (0.3, 1.2)])
def test_times_to_begin_are_right(step_s: tuple[float, float]) -> None:
    errors: list[float] = []
    for seed in range(5):
        fleet = Fleet(seed, step_s)
        fleet.run()
        assert len(fleet.errors) > AGENTS * (OVERLOAD - 1), "many were refused, and began"
        errors.append(median(fleet.errors))
    assert median(errors) < 0.2
