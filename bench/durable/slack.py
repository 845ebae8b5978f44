"""What background work costs whoever waits: agents alone, and beside a batch, on one worker with a real engine.

Agents take steps with pauses, streamed. They run alone and beside a batch that has more lines than can be done, in
turns. ``slack.ttft``: the 90th percentile of their times to first token beside the batch, in ms, and ``slack.mean``
their mean; the ratios are to those alone. ``slack.used``: output tokens of the batch a second, as a share of what it
gets alone in the time in which no agent's step is in progress.
"""

import asyncio
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
from rich.console import Console

from bench.common.fleet import fleet
from bench.common.report import Result, percentile
from bench.durable.batches import Batch, line
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from tracehaul.runtime import clock

AGENTS = 2
PAUSE_S = 1.5
OPENING_WORDS, MORE_WORDS = 200, 40
OUTPUT_TOKENS = 24
TURNS = 6
LINES = 2000
LINE_WORDS, LINE_TOKENS = 60, 48
SETTLE_S = 5.0
STORE_BYTES = 256 << 20


class Round(NamedTuple):
    """What was seen in one."""

    ttft_s: list[float]
    busy: float
    """The share of it in which an agent's step was in progress."""
    batch_per_s: float
    """Output tokens of the batch."""


class Agents:
    """Clients that wait for every token."""

    def __init__(self, url: str, model: str, seed: int) -> None:
        self._url = url
        self._model = model
        self._dice = random.Random(seed)
        self._names = 0
        self._spans: list[tuple[float, float]] = []
        self._ttft_s: list[float] = []

    def run(self, seconds: float) -> tuple[list[float], float]:
        """Times to first token, and the share of the time in which a step was in progress."""
        self._spans, self._ttft_s = [], []
        began_s = clock.perf_s()
        asyncio.run(self._all(began_s + seconds))
        return self._ttft_s, union(self._spans) / (clock.perf_s() - began_s)

    async def _all(self, until_s: float) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=120.0, trust_env=False) as http:
            await asyncio.gather(*(self._one(http, until_s) for _ in range(AGENTS)))

    async def _one(self, http: httpx.AsyncClient, until_s: float) -> None:
        messages: list[dict[str, str]] = []
        while clock.perf_s() < until_s:
            if len(messages) in (0, 2 * TURNS):
                self._names += 1
                messages = []
            words = MORE_WORDS if messages else OPENING_WORDS
            messages.append({"role": "user", "content": self._text(words)})
            began_s, first_s, said = clock.perf_s(), None, ""
            body = {"model": self._model, "messages": messages, "max_tokens": OUTPUT_TOKENS, "stream": True}
            async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                async for event in answer.aiter_lines():
                    if not event.startswith("data: {"):
                        continue
                    delta = msgspec.json.decode(event[6:])["choices"][0]["delta"]
                    if delta.get("content"):
                        first_s = first_s or clock.perf_s()
                        said += delta["content"]
            ended_s = clock.perf_s()
            self._spans.append((began_s, ended_s))
            self._ttft_s.append((first_s or ended_s) - began_s)
            messages.append({"role": "assistant", "content": said})
            await asyncio.sleep(self._dice.uniform(0.5, 1.5) * PAUSE_S)

    def _text(self, words: int) -> str:
        return f"{self._names} " + " ".join(str(self._dice.randrange(10_000)) for _ in range(words // 2))


def union(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds in which any of them was."""
    total, end_s = 0.0, 0.0
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, end_s))
        end_s = max(end_s, end)
    return total


def _rate(seconds: float, batch: Batch, agents: Agents | None) -> Round:
    before, began_s = _tokens(batch), clock.perf_s()
    if agents is None:
        asyncio.run(asyncio.sleep(seconds))
        seen: tuple[list[float], float] = ([], 0.0)
    else:
        seen = agents.run(seconds)
    return Round(*seen, (_tokens(batch) - before) / (clock.perf_s() - began_s))


def _tokens(batch: Batch) -> int:
    return LINE_TOKENS * sum(batch.now()["request_counts"][kind] for kind in ("completed", "failed"))


def slack_results(console: Console, *, quick: bool) -> list[Result]:
    """Both figures."""
    seconds, rounds = (20.0, 1) if quick else (60.0, 4)
    counts = NodeCounts(store=1, prefill=0, decode=1)
    config = ClusterConfig(port=free_port(), nodes=counts, threads=2, store_bytes=STORE_BYTES)
    found: dict[str, list[Round]] = {"alone": [], "beside": [], "batch": []}
    with tempfile.TemporaryDirectory() as folder, fleet(config, console) as running:
        path = Path(folder) / "calls.jsonl"
        dice = random.Random(2)
        more: dict[str, Any] = {"max_tokens": LINE_TOKENS, "ignore_eos": True}
        texts = (" ".join(str(dice.randrange(10_000)) for _ in range(LINE_WORDS // 2)) for _ in range(LINES))
        path.write_bytes(b"".join(line(running.model, at, text, **more) for at, text in enumerate(texts)))
        agents = Agents(running.url, running.model, 3)
        agents.run(seconds / 4)
        for _ in range(rounds):
            found["alone"].append(Round(*agents.run(seconds), 0.0))
            batch = Batch(httpx.URL(running.url).port or 0, path)
            asyncio.run(asyncio.sleep(SETTLE_S))
            found["batch"].append(_rate(seconds / 2, batch, None))
            found["beside"].append(_rate(seconds, batch, agents))
            batch.cancel()
            asyncio.run(asyncio.sleep(SETTLE_S))
    mean = {kind: _mean([s for each in found[kind] for s in each.ttft_s]) for kind in ("alone", "beside")}
    p90 = {kind: percentile([s for each in found[kind] for s in each.ttft_s], 0.9) for kind in ("alone", "beside")}
    idle = 1 - _mean([each.busy for each in found["alone"]])
    whole, used = (_mean([each.batch_per_s for each in found[kind]]) for kind in ("batch", "beside"))
    return [
        Result("slack.ttft.alone", 1e3 * p90["alone"], "ms"),
        Result("slack.ttft", 1e3 * p90["beside"], "ms", "slack.ttft.alone", p90["beside"] / p90["alone"]),
        Result("slack.mean.alone", 1e3 * mean["alone"], "ms"),
        Result("slack.mean", 1e3 * mean["beside"], "ms", "slack.mean.alone", mean["beside"] / mean["alone"]),
        Result("slack.idle", idle, "1"),
        Result("slack.batch", whole, "tokens/s"),
        Result("slack.used", used / (whole * idle), "1"),
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
