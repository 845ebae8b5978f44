"""What handing a prompt from a prefill worker to a decode worker costs beside one worker that does both.

Two whole clusters are up and take turns; the compute threads of every worker are the same. Timed is the client's wait
for the second token: the first comes from whoever computed the prompt, the second needs all of its KV where it is
decoded.
"""

import random
from contextlib import ExitStack
from statistics import median
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.progress import Progress

from bench.fleet import Fleet, fleet
from bench.report import Result
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from tracehaul.runtime import clock

PROMPT_TOKENS = 4096
THREADS = 2
KV_TOKENS = 16_384
VOCABULARY = 40_000
KINDS = {"one": 0, "two": 1}
"""Prefill workers of each cluster."""


def handoff(rounds: int, console: Console) -> list[Result]:
    """Milliseconds that two processes take longer than one, median over rounds in which both ran the same prompt:
    to the second token, and from the first to the second, which leaves out how fast the prompt happened to be."""
    waits: dict[str, list[Waits]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        clusters = {kind: stack.enter_context(fleet(_config(count), console)) for kind, count in KINDS.items()}
        with Progress(console=console) as progress:
            bar = progress.add_task("handoff", total=(rounds + 1) * len(clusters))
            for turn in range(rounds + 1):
                source = random.Random(turn)
                prompt = [source.randrange(1000, VOCABULARY) for _ in range(PROMPT_TOKENS)]
                for kind in list(clusters)[:: 1 if turn % 2 else -1]:
                    waited = two_tokens(clusters[kind], f"handoff-{turn}", prompt)
                    if turn:  # the first maps the store's memory
                        waits[kind].append(waited)
                    progress.advance(bar)
    pairs = list(zip(waits["one"], waits["two"], strict=True))
    total_ms = [1000 * (two.second_s - one.second_s) for one, two in pairs]
    gap_ms = [1000 * (two.gap_s - one.gap_s) for one, two in pairs]
    one_ms, two_ms = (1000 * median(w.second_s for w in waits[kind]) for kind in ("one", "two"))
    return [
        Result("engine.handoff.4k", median(total_ms), "ms", "engine.handoff.4k.one", two_ms / one_ms),
        Result("engine.handoff.4k.gap", median(gap_ms), "ms"),
        Result("engine.handoff.4k.one", one_ms, "ms"),
        Result("engine.handoff.4k.two", two_ms, "ms"),
    ]


class Waits(NamedTuple):
    """Seconds from a request to its first tokens."""

    first_s: float
    second_s: float

    @property
    def gap_s(self) -> float:
        """Between the two."""
        return self.second_s - self.first_s


def two_tokens(cluster: Fleet, trace: str, prompt: list[int]) -> Waits:
    """Ask for a few tokens, and time the first two."""
    began_s = clock.perf_s()
    times_s: list[float] = []
    for chunk in cluster.chunks(trace, prompt, 4, ignore_eos=True):
        count = sum(len(choice.get("token_ids") or []) for choice in chunk["choices"])
        times_s += [clock.perf_s() - began_s] * count
    return Waits(times_s[0], times_s[1])


def _config(prefill: int) -> ClusterConfig:
    nodes = NodeCounts(prefill=prefill, decode=1, store=1)
    return msgspec.structs.replace(ClusterConfig(), nodes=nodes, threads=THREADS, kv_tokens=KV_TOKENS, port=free_port())
