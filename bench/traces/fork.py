"""``fork.*``: a parent of 4k tokens forks into eight children at once, on a real cluster.

Each child's prompt is the parent's and a few tokens of its own; nobody has computed the parent's before. ``fork.ttft``
is the time until the last child has its first token, divided by that of eight prompts of the same length on the same
cluster that share nothing; ``fork.ttft.known`` is the same where the parent's own step has run. ``fork.computed`` is
what all children together had computed, by the workers' accounts, divided by the prefix once and each child's rest.
``.2p2d`` is added to the names where two prefill workers could each compute the prefix.
"""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from rich.console import Console

from bench.common.fleet import Fleet, Step, fleet
from bench.common.report import Result
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from tracehaul.runtime import clock

CHILDREN = 8
PARENT_TOKENS = 4096
QUICK_TOKENS = 1024
OWN_TOKENS = 48
"""Of each child."""
OUTPUT_TOKENS = 4
VOCABULARY = 40_000
"""Prompts are random ids below it: KV does not care about sense."""
KV_TOKENS = 36_864
"""Of each worker: eight prompts that share nothing fit, so that nobody waits for memory."""
STORE_BYTES = 3 << 30
SHAPES = {"": NodeCounts(prefill=1, decode=2), ".2p2d": NodeCounts(prefill=2, decode=2)}


def fork_results(rounds: int, config: dict[str, Any], console: Console, *, quick: bool) -> list[Result]:
    """Both shapes of cluster; ``quick``: the first alone, and a shorter parent."""
    tokens = QUICK_TOKENS if quick else PARENT_TOKENS
    config["fork"] = {"children": CHILDREN, "parent_tokens": tokens, "own_tokens": OWN_TOKENS, "kv_tokens": KV_TOKENS}
    results: list[Result] = []
    for suffix, nodes in list(SHAPES.items())[: 1 if quick else None]:
        shape = ClusterConfig(port=free_port(), nodes=nodes, kv_tokens=KV_TOKENS, store_bytes=STORE_BYTES)
        with fleet(shape, console) as cluster:
            _warm_up(cluster, nodes.decode)
            runs: dict[str, list[tuple[float, int]]] = {"shared": [], "known": [], "apart": []}
            for number in range(rounds):
                for kind, chosen in runs.items():
                    chosen.append(_forked(cluster, kind, f"{kind}-{number}", tokens))
                    last_s, computed = chosen[-1]
                    console.print(
                        f"{nodes.prefill} prefill, {nodes.decode} decode, round {number + 1}, {kind}: last child's "
                        f"first token after {last_s:.2f} s, {computed} tokens computed",
                        highlight=False,
                    )
        results += _results(suffix, runs, tokens)
    return results


def _results(suffix: str, runs: dict[str, list[tuple[float, int]]], tokens: int) -> list[Result]:
    seconds = {kind: median(last_s for last_s, _ in chosen) for kind, chosen in runs.items()}
    computed = {kind: max(count for _, count in chosen) for kind, chosen in runs.items()}
    needed = tokens + CHILDREN * OWN_TOKENS
    apart = f"fork.apart_s{suffix}"
    return [
        Result(apart, seconds["apart"], "s"),
        Result(f"fork.shared_s{suffix}", seconds["shared"], "s"),
        Result(f"fork.known_s{suffix}", seconds["known"], "s"),
        Result(
            f"fork.ttft{suffix}", seconds["shared"] / seconds["apart"], "1", apart, seconds["shared"] / seconds["apart"]
        ),
        Result(
            f"fork.ttft.known{suffix}",
            seconds["known"] / seconds["apart"],
            "1",
            apart,
            seconds["known"] / seconds["apart"],
        ),
        Result(f"fork.needed{suffix}", needed, "tokens"),
        Result(
            f"fork.computed{suffix}", computed["shared"], "tokens", f"fork.needed{suffix}", computed["shared"] / needed
        ),
    ]


def _warm_up(cluster: Fleet, decodes: int) -> None:
    """Every decode worker has mapped the store and pulled from it."""
    for number in range(decodes):
        cluster.step(f"warm-up-{number}", _tokens(600, f"warm-up-{number}"), 2, f"decode-{number}", ignore_eos=True)


def _forked(cluster: Fleet, kind: str, name: str, tokens: int) -> tuple[float, int]:
    """Seconds until the last child's first token, and prompt tokens that anybody computed for the children."""
    parent = _tokens(tokens, name)
    prompts: list[list[int]] = []
    for child in range(CHILDREN):
        before = _tokens(tokens, f"{name}/{child}") if kind == "apart" else parent
        prompts.append(before + _tokens(OWN_TOKENS, f"{name}/{child}/own"))
    if kind == "known":
        cluster.step(name, parent, OUTPUT_TOKENS, ignore_eos=True)
    began_s = clock.perf_s()

    def run(child: int) -> tuple[float, Step]:
        waited_s = clock.perf_s() - began_s
        return waited_s, cluster.step(f"{name}-{child}", prompts[child], OUTPUT_TOKENS, parent=name, ignore_eos=True)

    steps = _at_once(run)
    computed = sum(len(prompts[child]) - step.cached_tokens for child, (_, step) in enumerate(steps))
    return max(waited_s + step.ttft_s for waited_s, step in steps), computed


def _at_once(run: Callable[[int], tuple[float, Step]]) -> list[tuple[float, Step]]:
    threads = ThreadPoolExecutor(CHILDREN)
    try:
        return list(threads.map(run, range(CHILDREN)))
    finally:
        threads.shutdown(wait=False)  # who leaves early does not wait for their steps: the cluster ends before


def _tokens(count: int, seed: str) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(1000, VOCABULARY) for _ in range(count)]
