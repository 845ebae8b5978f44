"""A live cluster's costs as a shape: what its workers announce, and what they do not, asked of them.

Announced are seconds per token of a prompt, per token before it, and per token pulled. How an iteration that decodes
depends on how many decode, and on their contexts, is measured: a few batches on the first decode worker, while nothing
else should run.
"""

import asyncio
import random
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import httpx
import msgspec
import numpy as np

from bench.common.report import percentile
from router.fleet.members import NodeStatus
from sim.fleet.shape import Shape, StoreKind, WorkerKind
from tracehaul.runtime import clock
from tracehaul.wire.cluster import Rates
from tracehaul.wire.ids import NodeId

BATCHES = ((1, 256), (4, 256), (8, 256), (1, 2500), (2, 2500))
"""Sequences at once, and their prompts' tokens."""
OUTPUT_TOKENS = 32
PROMPTS = (300, 1500, 3000, 6000)
"""Long ones, too: what a token costs for those before it is hardly seen in short ones."""
TOGETHER_TOKENS = 1000
"""Of the prompts that two workers compute at once."""
LEARN = 2
"""Decode workers that are asked for prompts before their rates count: what one announces that has only started was
measured by any of its host within the last hour, whatever else ran then."""
BEAT_S = 2.5
"""Until what a worker has learned was announced."""
TIMEOUT_S = 120.0
ROUNDS = 2
TOGETHER_ROUNDS = 5


class Timed(NamedTuple):
    """One step as its client saw it: seconds since it was sent."""

    times_s: list[float]
    """Of each token."""
    sent_s: float


class NotACluster(Exception):
    """What answers there is no cluster that can be measured."""


async def calibrate(url: str, block_tokens: int | None = None) -> Shape:
    """Measure a cluster of our own that has nothing else to do.

    Raises:
        NotACluster: there is none, or none that serves.
    """
    base = url.rstrip("/").removesuffix("/v1")
    async with httpx.AsyncClient(base_url=base, timeout=TIMEOUT_S, trust_env=False) as http:
        nodes = await _nodes(http)
        decodes = [node for node in nodes if node.info.role == "decode"]
        if not decodes:
            raise NotACluster(f"no decode worker at {base} is ready")
        learned = {node.info.node for node in decodes[:LEARN]}
        asking = [_Asking(http, node.info.model, node.info.node) for node in decodes[:LEARN]]
        overheads = [await _prompts(one, node) for one, node in zip(asking, decodes, strict=False)]
        decode = await _decoding(asking[0], min(decodes[0].info.context_max, 4096))
        await asyncio.sleep(BEAT_S)
        nodes = await _nodes(http)
        shared = await _shared(http, [node for node in nodes if node.info.role == "decode"])
    workers = _kinds(nodes, learned, decode, float(np.mean(overheads)), shared)
    stores = [node for node in nodes if node.info.role == "store"]
    token_bytes = _token_bytes(nodes)
    kinds = [
        StoreKind(1, int(node.load.bytes_max // token_bytes), 0.0, int(node.load.disk_bytes_max // token_bytes))
        for node in stores
    ]
    size = block_tokens or decodes[0].info.block_tokens
    return Shape(workers, tuple(kinds), size)


async def _nodes(http: httpx.AsyncClient) -> list[NodeStatus]:
    try:
        answer = await http.get("/cluster")
        answer.raise_for_status()
        nodes = msgspec.json.decode(answer.content, type=list[NodeStatus])
    except (httpx.HTTPError, msgspec.DecodeError) as error:
        raise NotACluster(f"{http.base_url} is no router of ours, or may not be asked: {error}") from error
    return [node for node in nodes if node.health == "ready"]


class _Asking:
    """Steps on one worker."""

    def __init__(self, http: httpx.AsyncClient, model: str, worker: str) -> None:
        self._http = http
        self._model = model
        self._worker = worker
        self._random = random.Random(clock.wall_ns())

    def prompt(self, tokens: int) -> list[int]:
        """One that nobody has asked before."""
        return [self._random.randrange(100, 10_000) for _ in range(tokens)]

    async def step(self, trace: str, prompt: list[int], output: int) -> Timed:
        """Raises NotACluster: it did not answer as it should."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        headers = {"X-Trace-Id": trace, "X-Decode-Worker": self._worker}
        sent_s, times_s = clock.perf_s(), list[float]()
        try:
            async with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
                if not response.is_success:
                    raise NotACluster(f"a step was answered {response.status_code}: {(await response.aread())[:200]!r}")
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        for choice in msgspec.json.decode(line[6:]).get("choices", ()):
                            times_s += [clock.perf_s() - sent_s] * len(choice.get("token_ids") or ())
        except httpx.HTTPError as error:
            raise NotACluster(f"a step failed: {error or type(error).__name__}") from error
        return Timed(times_s, sent_s)

    async def batch(self, count: int, tokens: int) -> tuple[float, float]:
        """What an iteration takes that decodes so many sequences, and their tokens in all on the mean."""
        prompts = [self.prompt(tokens) for _ in range(count)]
        traces = [f"fleet-{clock.wall_ns()}-{number}" for number in range(count)]
        for trace, prompt in zip(traces, prompts, strict=True):
            await self.step(trace, prompt, 1)
        steps = await asyncio.gather(
            *(self.step(trace, prompt, OUTPUT_TOKENS) for trace, prompt in zip(traces, prompts, strict=True))
        )
        begin_s = max(step.sent_s + step.times_s[0] for step in steps)
        end_s = min(step.sent_s + step.times_s[-1] for step in steps)
        gaps = [
            after - before
            for step in steps
            for before, after in zip(step.times_s, step.times_s[1:], strict=False)
            if step.sent_s + before >= begin_s - 1e-3 and step.sent_s + after <= end_s + 1e-3
        ]
        return float(np.mean(gaps)), count * (tokens + OUTPUT_TOKENS / 2)


async def _prompts(asking: _Asking, worker: NodeStatus) -> float:
    """Let the worker learn from prompts; returns what a step takes beside computing and decoding."""
    extras: list[float] = []
    for tokens in PROMPTS:
        if tokens + OUTPUT_TOKENS < worker.info.context_max:
            trace, prompt = f"fleet-{clock.wall_ns()}", asking.prompt(tokens)
            await asking.step(trace, prompt, 1)
            again = await asking.step(trace, prompt, 4)  # all of it is there but its last token
            extras.append(again.times_s[0] - (again.times_s[-1] - again.times_s[0]) / 3)
    return max(0.0, percentile(extras, 0.5))


async def _decoding(asking: _Asking, longest: int) -> tuple[float, float, float]:
    """Seconds of an iteration, whatever decodes in it; per sequence; per token of them."""
    rows: list[tuple[float, float, float]] = []
    took: list[float] = []
    for _ in range(ROUNDS):
        for count, tokens in BATCHES:
            if tokens + OUTPUT_TOKENS < longest:
                seconds, total = await asking.batch(count, tokens)
                rows.append((1.0, count, total))
                took.append(seconds)
    weights = 1 / np.array(took)
    fitted, *_ = np.linalg.lstsq(np.array(rows) * weights[:, None], np.ones(len(took)), rcond=None)
    base, sequence, token = (max(0.0, float(part)) for part in fitted)
    return base, sequence, token


async def _shared(http: httpx.AsyncClient, decodes: Sequence[NodeStatus]) -> float:
    """By how much one worker slows another on the same host while both compute a prompt and decode; 0 where there is
    only one."""
    hosts = {decodes[0].info.host}
    together = [node for node in decodes if node.info.host in hosts][:2]
    if len(together) < 2:
        return 0.0
    asking = [_Asking(http, node.info.model, node.info.node) for node in together]

    async def takes_s(one: _Asking) -> float:
        step = await one.step(f"fleet-{clock.wall_ns()}", one.prompt(TOGETHER_TOKENS), OUTPUT_TOKENS)
        return step.times_s[-1]

    slower: list[float] = []
    for number in range(TOGETHER_ROUNDS):
        alone_s = await takes_s(asking[number % 2])
        both_s = await asyncio.gather(*map(takes_s, asking))
        slower.append(float(np.mean(both_s)) / alone_s - 1)
    return max(0.0, percentile(slower, 0.5))


def _kinds(
    nodes: Sequence[NodeStatus],
    learned: Collection[NodeId],
    decode: tuple[float, float, float],
    overhead_s: float,
    shared: float,
) -> tuple[WorkerKind, ...]:
    """``learned``: the decode workers whose rates count."""
    kinds: list[WorkerKind] = []
    for role in ("decode", "prefill"):
        alike = [node for node in nodes if node.info.role == role]
        if not alike:
            continue
        rates = [_rates(node) for node in alike if role == "prefill" or node.info.node in learned]
        info = alike[0].info
        limits = info.limits
        hosts = len({node.info.host for node in nodes if node.info.role != "store"})
        kinds.append(
            WorkerKind(
                count=len(alike),
                role="decode" if role == "decode" else "prefill",
                token_s=float(np.mean([rate.token_s for rate in rates])),
                pair_s=float(np.mean([rate.pair_s for rate in rates])),
                iteration_s=decode[0],
                sequence_s=decode[1],
                context_token_s=decode[2],
                pull_token_s=float(np.mean([rate.pull_token_s for rate in rates])),
                kv_tokens=limits.kv_tokens_max,
                step_s=overhead_s if role == "decode" else 0.0,
                chunk_tokens=limits.chunk_tokens,
                sequences_max=limits.sequences_max,
                local_prefill_tokens=limits.local_prefill_tokens,
                stretch=limits.stretch,
                host_workers=-(-len(alike) // hosts),
                shared=shared,
            )
        )
    return tuple(kinds)


def _rates(node: NodeStatus) -> Rates:
    load = node.load
    return Rates(load.token_s, load.pair_s, load.decode_s, load.pull_token_s) if load.token_s else node.info.rates


def _token_bytes(nodes: Sequence[NodeStatus]) -> float:
    sizes = [
        node.load.bytes_max / node.info.limits.kv_tokens_max
        for node in nodes
        if node.info.role != "store" and node.info.limits.kv_tokens_max
    ]
    return float(np.mean(sizes)) if sizes else 1.0
