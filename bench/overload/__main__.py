"""``python -m bench.overload``: agents on a live fleet, then four times as many of them for two minutes.

A router that admits traces, a store node and two decode workers whose engine is the fake one: all but the computing is
real. ``overload.pace``: how long steps of traces that were let in take, before and meanwhile;
``overload.begins``: by how much the times to begin that refused traces were told first were wrong, at the median;
``overload.lost``: calls that ended otherwise than with an answer or a refusal that says when to come back.
"""

import asyncio
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from bench.common.fake_machine import fleet
from bench.common.report import Result, finish
from router.policy.admission import AdmissionConfig
from tracehaul.runtime import clock

KV_TOKENS = 8192
"""Of each worker: some ten contexts."""
AGENTS, OVERLOAD = 14, 4
STEPS, FIRST_TOKENS, MORE_TOKENS, ANSWER_TOKENS = 8, 300, 80, 24
GAP_S = (0.5, 1.5)
CALM_S, OVERLOAD_S = 40.0, 120.0
TIMEOUT_S = 120.0


@dataclass
class Seen:
    """By all agents."""

    steps: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """When each began that was let in, and how long it took."""
    waits: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """Of each trace that was refused and has begun: what it was told first, and how long it waited."""
    refused: int = 0
    """Traces."""
    lost: list[str] = field(default_factory=list[str])


class Agent:
    """Runs one trace after the other."""

    def __init__(self, http: httpx.AsyncClient, seen: Seen, name: str) -> None:
        self._http = http
        self._seen = seen
        self._name = name
        self._dice = random.Random(name)
        self._traces = 0

    async def run(self, until_s: float) -> None:
        """Begin traces until then."""
        while clock.perf_s() < until_s:
            self._traces += 1
            await self._trace(f"{self._name}-{self._traces}", until_s)

    async def _trace(self, trace: str, until_s: float) -> None:
        prompt = self._new(FIRST_TOKENS)
        asked_s, told_s = clock.perf_s(), None
        for step in range(STEPS):
            while True:
                began_s = clock.perf_s()
                answer = await self._ask(trace, prompt, final=step == STEPS - 1)
                if answer is None:
                    return
                if answer.status_code != 429:
                    break
                if told_s is None:
                    told_s = float(answer.headers["x-begins-in-s"])
                    self._seen.refused += 1
                if step or clock.perf_s() > until_s:
                    assert not step, "a trace that was let in is not refused"
                    return
                await asyncio.sleep(float(answer.headers["retry-after"]))
            if told_s is not None and not step:
                self._seen.waits.append((told_s, began_s - asked_s))
            self._seen.steps.append((began_s, clock.perf_s() - began_s))
            prompt += answer.json()["choices"][0]["token_ids"] + self._new(MORE_TOKENS)
            await asyncio.sleep(self._dice.uniform(*GAP_S))

    async def _ask(self, trace: str, prompt: list[int], *, final: bool) -> httpx.Response | None:
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
        headers = {"x-trace-id": trace, **({"x-trace-final": "true"} if final else {})}
        try:
            answer = await self._http.post("/v1/completions", json=body | {"return_token_ids": True}, headers=headers)
        except httpx.HTTPError as error:
            self._seen.lost.append(f"{trace}: {type(error).__name__} {error}")
            return None
        if answer.status_code not in (200, 429):
            self._seen.lost.append(f"{trace}: {answer.status_code} {answer.text[:200]}")
            return None
        return answer

    def _new(self, tokens: int) -> list[int]:
        return [self._dice.randrange(100, 10_000) for _ in range(tokens)]


async def measure(url: str, calm_s: float, overload_s: float) -> list[Result]:
    """Calm, then overload."""
    seen = Seen()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False, limits=limits) as http:
        began_s = clock.perf_s()
        burst_s = began_s + calm_s
        agents = [Agent(http, seen, f"calm-{at}") for at in range(AGENTS)]
        more = [Agent(http, seen, f"more-{at}") for at in range((OVERLOAD - 1) * AGENTS)]
        async with asyncio.TaskGroup() as tasks:
            for agent in agents:
                tasks.create_task(agent.run(burst_s + overload_s))
            await asyncio.sleep(calm_s)
            for agent in more:
                tasks.create_task(agent.run(burst_s + overload_s))
    calm = [took_s for at_s, took_s in seen.steps if began_s + calm_s / 4 <= at_s < burst_s]
    burst = [took_s for at_s, took_s in seen.steps if burst_s <= at_s < burst_s + overload_s]
    errors = [abs(told_s / max(waited_s, 0.1) - 1) for told_s, waited_s in seen.waits]
    for line in seen.lost[:3]:
        Console(stderr=True).print(line, markup=False)
    rate, calm_rate = len(burst) / overload_s, len(calm) / (0.75 * calm_s)
    before_s, after_s = sum(calm) / len(calm), sum(burst) / len(burst)
    return [
        Result("overload.step.calm", before_s, "s"),
        Result("overload.step", after_s, "s", "overload.step.calm", after_s / before_s),
        Result("overload.pace", before_s / after_s, "1"),
        Result("overload.steps", rate, "1/s", "overload.steps.calm", rate / calm_rate),
        Result("overload.steps.calm", calm_rate, "1/s"),
        Result("overload.refused", seen.refused, "traces"),
        Result("overload.waited", median([waited_s for _, waited_s in seen.waits] or [0.0]), "s"),
        Result("overload.begins", median(errors or [0.0]), "1"),
        Result("overload.lost", len(seen.lost), "calls"),
    ]


def main(
    calm_s: Annotated[float, typer.Option("--calm", min=4)] = CALM_S,
    overload_s: Annotated[float, typer.Option("--overload", min=4)] = OVERLOAD_S,
    open_gate: Annotated[bool, typer.Option("--open", help="Let every trace begin at once, to compare with.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
) -> None:
    """Agents on a live fleet of fake engines, then four times as many of them."""
    admission = AdmissionConfig(enabled=not open_gate)

    async def run(folder: Path) -> list[Result]:
        async with fleet(folder, admission, KV_TOKENS) as url:
            return await measure(url, calm_s, overload_s)

    with tempfile.TemporaryDirectory() as folder:
        results = asyncio.run(run(Path(folder)))
    config = {
        "agents": AGENTS,
        "overload": OVERLOAD,
        "kv_tokens": KV_TOKENS,
        "calm_s": calm_s,
        "overload_s": overload_s,
    }
    finish(config | {"admission": not open_gate}, results, json, Console())


if __name__ == "__main__":
    typer.run(main)
