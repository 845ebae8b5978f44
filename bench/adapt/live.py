"""Three shifts of the mix on a live fleet: the router's loop, begun with a wrong split, against each split that is left
alone.
"""

import asyncio
import random
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from bench.adapt.live_fleet import WORKERS, fleet
from bench.common.report import Result
from router.adapt.loop import AdaptConfig
from tracehaul.runtime import clock

SHIFT_S = 30.0
"""After a shift a phase's figure counts from here on."""
WARM_UP_S = 20.0
AROUND_S = 10.0
"""So long before and after a worker changed its role hits are compared."""
TIMEOUT_S = 120.0
LATE = 504
"""Status of what was ended at its deadline."""
LOOK_S = 0.25
ADAPT = AdaptConfig(enabled=True, every_s=1.0, gain_min=0.1, pause_s=2.0)
BEGUN_WITH = 1
"""Prefill workers of ours, when long prompts come first."""


class Kind(NamedTuple):
    """Agents of one kind. Tokens; each figure is the middle of a range from half of it to one and a half."""

    agents: int
    first: int
    more: int
    output: int
    steps: int
    gap_s: float = 0.5
    deadline_s: float = 30.0
    """A step that takes longer does not count: it is ended then."""
    children: int = 0
    """Traces that go on from the first step's context, all at once."""


PHASES: Mapping[str, Sequence[Kind]] = {
    "prompts": (
        Kind(8, first=2000, more=1500, output=8, steps=4, deadline_s=60.0),
        Kind(14, first=40, more=15, output=8, steps=8, deadline_s=2.5),
    ),
    "answers": (Kind(24, first=40, more=12, output=30, steps=6),),
    "forks": (Kind(5, first=900, more=40, output=16, steps=2, children=6),),
}


class Step(NamedTuple):
    """One that was answered."""

    ended_s: float
    had: int
    """Tokens of its trace that somebody has computed."""
    cached: int


@dataclass
class Seen:
    """In one run."""

    steps: list[Step] = field(default_factory=list[Step])
    late: int = 0
    """Ended at their deadlines."""
    failed: list[str] = field(default_factory=list[str])
    turned_s: list[float] = field(default_factory=list[float])
    """When a worker was seen in another role."""
    splits: list[str] = field(default_factory=list[str])
    """At each end of a phase."""


class Agent:
    """Runs one trace after the other, of the kind that it is."""

    def __init__(self, http: httpx.AsyncClient, seen: Seen, kind: Kind, name: str) -> None:
        self._http = http
        self._seen = seen
        self._kind = kind
        self._name = name
        self._dice = random.Random(name)
        self.ends = False

    async def run(self) -> None:
        """Until it is to end: the trace that has begun is left there."""
        traces = 0
        while not self.ends:
            traces += 1
            name, prompt = f"{self._name}-{traces}", list[int]()
            children = self._kind.children
            steps = 1 if children else self._kind.steps
            known = await self._trace(name, prompt, steps, self._about(self._kind.first), 0)
            if children and known:
                forks = (
                    self._trace(f"{name}-{at}", list(prompt), self._kind.steps, self._about(self._kind.more), known)
                    for at in range(children)
                )
                await asyncio.gather(*forks)

    async def _trace(self, name: str, prompt: list[int], steps: int, first: int, known: int) -> int:
        """Adds to the prompt; returns what is computed of it."""
        for step in range(steps):
            if self.ends:
                return 0
            prompt += self._new(self._about(self._kind.more) if step else first)
            answer = await self._ask(name, prompt, self._about(self._kind.output), final=step == steps - 1)
            if answer is None:
                await asyncio.sleep(self._kind.gap_s)
                return 0
            now_s = clock.perf_s()
            cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            self._seen.steps.append(Step(now_s, known, min(known, cached)))
            prompt += answer["choices"][0]["token_ids"]
            known = len(prompt) - 1  # nobody has the KV of the last token
            await asyncio.sleep(self._kind.gap_s * self._dice.uniform(0.5, 1.5))
        return known

    async def _ask(self, trace: str, prompt: list[int], output: int, *, final: bool) -> dict[str, Any] | None:
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True}
        headers = {"x-trace-id": trace, "x-deadline-s": str(self._kind.deadline_s)}
        headers |= {"x-trace-final": "true"} if final else {}
        try:
            answer = await self._http.post("/v1/completions", json=body | {"return_token_ids": True}, headers=headers)
        except httpx.HTTPError as error:
            self._seen.failed.append(f"{trace}: {type(error).__name__} {error}")
            return None
        if answer.status_code == LATE:
            self._seen.late += 1
            return None
        if answer.status_code != 200:
            self._seen.failed.append(f"{trace}: {answer.status_code} {answer.text[:200]}")
            return None
        return answer.json()

    def _about(self, middle: int) -> int:
        return max(1, round(middle * self._dice.uniform(0.5, 1.5)))

    def _new(self, tokens: int) -> list[int]:
        return [self._dice.randrange(100, 10_000) for _ in range(tokens)]


class Outcome(NamedTuple):
    """Of one run."""

    phases: dict[str, float]
    """Steps in time per second, after the first seconds of each."""
    whole: float
    seen: Seen


async def measure(folder: Path, prefills: int, adapt: AdaptConfig, seconds: float) -> Outcome:
    """All phases, one after the other, on one fleet."""
    seen = Seen()
    limits = httpx.Limits(max_connections=None)
    async with (
        fleet(folder, prefills, adapt) as url,
        httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False, limits=limits) as http,
        asyncio.TaskGroup() as tasks,
    ):
        watching = tasks.create_task(_watch(http, seen))
        shifts_s: list[float] = []
        for number, (name, kinds) in enumerate(PHASES.items()):
            agents = [
                Agent(http, seen, kind, f"{name}-{k}-{a}") for k, kind in enumerate(kinds) for a in range(kind.agents)
            ]
            for agent in agents:
                tasks.create_task(agent.run())
            if not number:
                await asyncio.sleep(WARM_UP_S)
            shifts_s.append(clock.perf_s())
            await asyncio.sleep(seconds)
            for agent in agents:
                agent.ends = True
            seen.splits.append(await _split(http))
        shifts_s.append(clock.perf_s())
        watching.cancel()
    done_s = sorted(step.ended_s for step in seen.steps)

    def rate(from_s: float, to_s: float) -> float:
        return (bisect(done_s, to_s) - bisect(done_s, from_s)) / (to_s - from_s)

    settle_s = min(SHIFT_S, seconds / 2)
    phases = {name: rate(shifts_s[at] + settle_s, shifts_s[at + 1]) for at, name in enumerate(PHASES)}
    return Outcome(phases, rate(shifts_s[0], shifts_s[-1]), seen)


async def _roles(http: httpx.AsyncClient) -> dict[str, str]:
    told = (await http.get("/cluster")).json()
    roles = {node["info"]["node"]: node["info"]["role"] for node in told}
    return {node: role for node, role in roles.items() if role in ("prefill", "decode")}


async def _split(http: httpx.AsyncClient) -> str:
    roles = list((await _roles(http)).values())
    return f"{roles.count('prefill')}p{roles.count('decode')}d"


async def _watch(http: httpx.AsyncClient, seen: Seen) -> None:
    before = await _roles(http)
    while True:
        await asyncio.sleep(LOOK_S)
        now = await _roles(http)
        if any(before.get(node) != role for node, role in now.items()):
            seen.turned_s.append(clock.perf_s())
        before = now


def hits(seen: Seen) -> tuple[float, float]:
    """Of what traces had, the share that was not computed again: before workers changed their roles, and after."""

    def share(low_s: float, high_s: float) -> float:
        near = [
            step
            for step in seen.steps
            if step.had and any(low_s <= step.ended_s - at_s < high_s for at_s in seen.turned_s)
        ]
        return sum(step.cached for step in near) / max(1, sum(step.had for step in near))

    return share(-AROUND_S, 0.0), share(0.0, AROUND_S)


def results(fixed: Mapping[int, Outcome], ours: Outcome) -> list[Result]:
    """By their names."""
    found: list[Result] = []
    for prefills, one in fixed.items():
        split = f"{prefills}p{WORKERS - prefills}d"
        found += [Result(f"adapt.live.{name}.{split}", value, "1/s") for name, value in one.phases.items()]
        found.append(Result(f"adapt.live.whole.{split}", one.whole, "1/s"))
    ratios: list[float] = []
    for name, value in ours.phases.items():
        best = max(fixed, key=lambda prefills: fixed[prefills].phases[name])
        ratios.append(value / fixed[best].phases[name])
        versus = f"adapt.live.{name}.{best}p{WORKERS - best}d"
        found.append(Result(f"adapt.live.{name}", value, "1/s", versus, ratios[-1]))
    best = max(fixed, key=lambda prefills: fixed[prefills].whole)
    whole = ours.whole / fixed[best].whole
    found.append(Result("adapt.live.whole", ours.whole, "1/s", f"adapt.live.whole.{best}p{WORKERS - best}d", whole))
    before, after = hits(ours.seen)
    found.append(Result("adapt.ratio", min(ratios), "1"))
    found.append(Result("adapt.whole", whole, "1"))
    found.append(Result("adapt.failed", len(ours.seen.failed), "calls"))
    found.append(Result("adapt.failed.fixed", sum(len(one.seen.failed) for one in fixed.values()), "calls"))
    found.append(Result("adapt.flips", len(ours.seen.turned_s), "changes"))
    found.append(Result("adapt.flip.hits", after / max(before, 1e-9), "1"))
    return found
