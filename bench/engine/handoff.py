"""What handing a prompt from a prefill worker to a decode worker costs beside one worker that does both.

Two whole clusters are up and take turns; the compute threads of every worker are the same. Timed by the client's clock
are its waits for the first two tokens: the first comes from whoever computed the prompt, the second needs all of the
prompt's KV where it is decoded.

A prompt takes seconds, and no two runs of it are alike to a hundredth. So the handoff itself is what passes between the
two tokens, here and there, in which no prompt is computed; the wait for both is told beside it, with its spread.
"""

import random
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median, quantiles
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from bench.common.fleet import Fleet, fleet
from bench.common.report import Result
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from router.dispatch.config import DispatchConfig
from tracehaul.runtime import clock

PROMPT_TOKENS = 4096
THREADS = 2
KV_TOKENS = 16_384
VOCABULARY = 40_000
KINDS = {"one": 0, "two": 1}
"""Prefill workers of each cluster."""
ROUNDS = 9
ROUNDS_QUICK = 2


class Waits(NamedTuple):
    """Seconds from a request to its first tokens."""

    first_s: float
    second_s: float

    @property
    def gap_s(self) -> float:
        """Between the two."""
        return self.second_s - self.first_s


def handoff(quick: bool, console: Console) -> list[Result]:
    """Milliseconds that two processes take longer than one over the same prompts."""
    rounds = ROUNDS_QUICK if quick else ROUNDS
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
    return compared(waits["one"], waits["two"])


def compared(one: list[Waits], two: list[Waits]) -> list[Result]:
    """Differences of the same rounds, their medians and, of the whole wait, their quartiles. Pure."""

    def ms(of: Callable[[Waits], float]) -> list[float]:
        return [1000 * (of(longer) - of(shorter)) for shorter, longer in zip(one, two, strict=True)]

    name = "engine.handoff.4k"
    gap_ms = [1000 * median(waited.gap_s for waited in kind) for kind in (one, two)]
    wait_ms = [1000 * median(waited.second_s for waited in kind) for kind in (one, two)]
    over = ms(lambda waited: waited.second_s)
    low, _, high = quantiles(over, n=4)
    return [
        Result(name, median(ms(lambda waited: waited.gap_s)), "ms"),
        Result(f"{name}.gap.one", gap_ms[0], "ms"),
        Result(f"{name}.gap.two", gap_ms[1], "ms"),
        Result(f"{name}.total", median(over), "ms", f"{name}.total.one", wait_ms[1] / wait_ms[0]),
        Result(f"{name}.total.low", low, "ms"),
        Result(f"{name}.total.high", high, "ms"),
        Result(f"{name}.total.one", wait_ms[0], "ms"),
        Result(f"{name}.total.two", wait_ms[1], "ms"),
    ]


def two_tokens(cluster: Fleet, trace: str, prompt: list[int]) -> Waits:
    """Ask for a few tokens, and time the first two."""
    began_s = clock.perf_s()
    times_s: list[float] = []
    usage: dict[str, Any] = {}
    for chunk in cluster.chunks(trace, prompt, 4, ignore_eos=True):
        count = sum(len(choice.get("token_ids") or []) for choice in chunk["choices"])
        times_s += [clock.perf_s() - began_s] * count
        usage = chunk.get("usage") or usage
    handed_over = usage["tracehaul"]["pulled_tokens"] == len(prompt)
    if handed_over != ("prefill-0" in cluster.pids()):
        raise RuntimeError("the prompt was not computed where it should have been")
    return Waits(times_s[0], times_s[1])


def _config(prefill: int) -> ClusterConfig:
    return ClusterConfig(
        nodes=NodeCounts(prefill=prefill, decode=1, store=1),
        threads=THREADS,
        kv_tokens=KV_TOKENS,
        port=free_port(),
        # By cost an idle decode worker computes the prompt itself: that is quicker on cores that both share.
        dispatch=DispatchConfig(policy="round-robin"),
    )
