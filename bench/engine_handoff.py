"""What handing a prompt from a prefill worker to a decode worker costs beside one worker that does both.

Two whole clusters are up and take turns; the compute threads of every worker are the same. Timed is the client's wait
for the second token: the first comes from whoever computed the prompt, the second needs all of its KV where it is
decoded.
"""

import random
from contextlib import ExitStack
from statistics import median

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
    """Milliseconds that two processes take longer than one, median over rounds in which both ran the same prompt."""
    waits_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        clusters = {kind: stack.enter_context(fleet(_config(count), console)) for kind, count in KINDS.items()}
        with Progress(console=console) as progress:
            bar = progress.add_task("handoff", total=(rounds + 1) * len(clusters))
            for turn in range(rounds + 1):
                source = random.Random(turn)
                prompt = [source.randrange(1000, VOCABULARY) for _ in range(PROMPT_TOKENS)]
                for kind in list(clusters)[:: 1 if turn % 2 else -1]:
                    seconds = second_token_s(clusters[kind], f"handoff-{turn}", prompt)
                    if turn:  # the first maps the store's memory
                        waits_s[kind].append(seconds)
                    progress.advance(bar)
    extra_ms = [1000 * (two - one) for one, two in zip(waits_s["one"], waits_s["two"], strict=True)]
    one_ms, two_ms = 1000 * median(waits_s["one"]), 1000 * median(waits_s["two"])
    return [
        Result("engine.handoff.4k", median(extra_ms), "ms", "engine.handoff.4k.one", two_ms / one_ms),
        Result("engine.handoff.4k.one", one_ms, "ms"),
        Result("engine.handoff.4k.two", two_ms, "ms"),
    ]


def second_token_s(cluster: Fleet, trace: str, prompt: list[int]) -> float:
    """Seconds from the request to its second token."""
    began_s = clock.perf_s()
    seen, took_s = 0, 0.0
    for chunk in cluster.chunks(trace, prompt, 4, ignore_eos=True):
        seen += sum(len(choice.get("token_ids") or []) for choice in chunk["choices"])
        if seen >= 2 and not took_s:
            took_s = clock.perf_s() - began_s
    return took_s


def _config(prefill: int) -> ClusterConfig:
    nodes = NodeCounts(prefill=prefill, decode=1, store=1)
    return msgspec.structs.replace(ClusterConfig(), nodes=nodes, threads=THREADS, kv_tokens=KV_TOKENS, port=free_port())
