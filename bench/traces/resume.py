"""``resume.*``: a trace of 7k tokens idles while its workers fill with others' contexts; then its next step comes.

Times to first token of steps with 64 new tokens, against the trace's own first step (``resume.cold_s``: all of it is
computed): ``resume.warm`` where nobody else came in between; ``resume.memory`` from the store's memory; ``resume.disk``
from the disk of a store whose memory the others have filled, without the router's pins. ``resume.prefetched`` is
against the warm step: the client has said ``resume`` before it, with ``.disk`` on that store; ``.told``: it had said
when it would be back, and nothing since. ``resume.learned``, too, is against a warm step: the client has said nothing,
but other traces of its kind have come back after as long. ``.resident`` and ``.pulled`` are the tokens that were there
and that were brought in those steps, as the workers tell; ``.loaded`` the blocks that the disk had to give meanwhile.
"""

import asyncio
import random
from collections import defaultdict
from statistics import median
from typing import Any

import msgspec
from rich.console import Console

from bench.common.fleet import Fleet, Step, fleet
from bench.common.report import Result
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from router.dispatch.config import DispatchConfig
from router.policy.retention import RetentionConfig
from tracehaul.runtime import clock

CONTEXT_TOKENS = 7168
QUICK_TOKENS = 2048
NEW_TOKENS = 64
OUTPUT_TOKENS = 4
VOCABULARY = 40_000
"""Prompts are random ids below it: KV does not care about sense."""
TIMES = 2
"""That each kind of return is measured."""
DECODES = 2
OTHERS = 4
"""Other traces on each decode worker; one of them has a third of the trace's own length."""
STORE_BYTES = 2 << 30
DISK_BYTES = 4 << 30
LEAD_S = 1.5
"""Between ``resume`` and the step."""
AWAY_S = 8.0
"""Said in ``suspend``, and learned: longer than filling the workers takes."""
LIKE = 12
"""Traces whose gaps are learned from."""
LIKE_TOKENS = 64
LIKE_GAPS = 4
LOADED = "tracehaul_disk_loaded_blocks_total"


def resume_results(config: dict[str, Any], console: Console, *, quick: bool) -> list[Result]:
    """On two clusters of one prefill and two decode workers: all of the store in memory, and most of it on disk."""
    size = QUICK_TOKENS if quick else CONTEXT_TOKENS
    shape = ClusterConfig(
        nodes=NodeCounts(prefill=1, decode=DECODES),
        kv_tokens=size + size // 2 + 1024,
        store_bytes=STORE_BYTES,
    )
    others = {"others": OTHERS * DECODES, "tokens": size // 3, "kv_tokens": shape.kv_tokens}
    config["resume"] = {"context_tokens": size, "new_tokens": NEW_TOKENS, "lead_s": LEAD_S, "away_s": AWAY_S} | others
    results: list[Result] = []
    with fleet(msgspec.structs.replace(shape, port=free_port()), console) as cluster:
        bench = _Bench(cluster, size, console)
        bench.run(("memory", "prefetched", "told"), 1 if quick else TIMES)
        results += bench.results("")
    below = msgspec.structs.replace(
        shape,
        port=free_port(),
        store_bytes=_arena_bytes(size),
        disk_bytes=DISK_BYTES,
        # Else its pin keeps an idle trace in memory, and the others' blocks leave.
        dispatch=DispatchConfig(retention=RetentionConfig(pins=False)),
    )
    with fleet(below, console) as cluster:
        bench = _Bench(cluster, size, console)
        bench.run(("disk", "prefetched"), 1 if quick else TIMES)
        results += bench.results(".disk")
    with fleet(msgspec.structs.replace(shape, port=free_port()), console) as cluster:
        bench = _Bench(cluster, size, console)
        bench.learn(AWAY_S)
        bench.run(("learned",), 1 if quick else TIMES)
        results += bench.results(".like")
    return results


def _arena_bytes(size: int) -> int:
    """Memory that the trace and one of the others fill."""
    return 23_040 * (size + size // 2)


class _Trace:
    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self._random = random.Random(name)
        self.prompt = self._tokens(size)

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(1000, VOCABULARY) for _ in range(count)]

    def step(self, cluster: Fleet, decode: str | None = None) -> Step:
        step = cluster.step(self.name, self.prompt, OUTPUT_TOKENS, decode, ignore_eos=True)
        self.prompt = self.prompt + step.tokens + self._tokens(NEW_TOKENS)
        return step


class _Bench:
    """One cluster, the trace, and the others."""

    def __init__(self, cluster: Fleet, size: int, console: Console) -> None:
        self._cluster = cluster
        self._console = console
        self._own = _Trace("own", size)
        self._size = size
        self._others = self._some()
        self._steps: defaultdict[str, list[Step]] = defaultdict(list)
        self._loaded: defaultdict[str, list[float]] = defaultdict(list)

    def _some(self, called: str = "other") -> list[tuple[str, _Trace]]:
        count = OTHERS * DECODES
        return [(f"decode-{n % DECODES}", _Trace(f"{called}-{n}", self._size // 3)) for n in range(count)]

    def learn(self, gap_s: float) -> None:
        """Short traces, each of whose steps comes that long after the one before it."""
        self._console.print(f"{LIKE} traces make {LIKE_GAPS} gaps of {gap_s:.0f} s each", highlight=False)
        ended_s = [0.0] * LIKE
        traces = [_Trace(f"like-{n}", LIKE_TOKENS) for n in range(LIKE)]
        for turn in range(LIKE_GAPS + 1):
            for n, trace in enumerate(traces):
                if turn:
                    _sleep(ended_s[n] + gap_s - clock.perf_s())
                trace.step(self._cluster)
                ended_s[n] = clock.perf_s()

    def run(self, kinds: tuple[str, ...], times: int) -> None:
        """The trace's first steps, cold and warm, and then its returns of each kind."""
        for number in range(DECODES):
            _Trace(f"warm-up-{number}", 600).step(self._cluster, f"decode-{number}")
        self._step("cold")
        for _ in range(times):
            self._step("warm")
        for kind in kinds:  # those that nothing is done for come first: later it is learned when the trace comes back
            for number in range(times):
                if kind == "learned":  # no gap of theirs is to be learned
                    self._others = self._some(f"other-{number}")
                self._back(kind)

    def _back(self, kind: str) -> None:
        """The others come, and then the trace's next step."""
        path, began_s = f"/v1/traces/{self._own.name}", clock.perf_s()
        if kind == "told":
            self._cluster.post(f"{path}/suspend", {"expected_s": AWAY_S})
        for decode, other in self._others:
            other.step(self._cluster, decode)
        if kind in ("told", "learned"):
            _sleep(AWAY_S - (clock.perf_s() - began_s))
        if kind == "prefetched":
            self._cluster.post(f"{path}/resume", {})
            _sleep(LEAD_S)
        self._step(kind)

    def _step(self, kind: str) -> None:
        loaded = self._cluster.metric("store-0", LOADED)
        step = self._own.step(self._cluster)
        self._loaded[kind].append(self._cluster.metric("store-0", LOADED) - loaded)
        self._steps[kind].append(step)
        moved = step.moved
        self._console.print(
            f"{kind}: first token after {step.ttft_s:.3f} s, of {step.usage['prompt_tokens']} tokens "
            f"{moved['resident_tokens']} resident, {moved['pulled_tokens']} pulled, "
            f"{self._loaded[kind][-1]:.0f} blocks from disk",
            highlight=False,
        )

    def results(self, suffix: str) -> list[Result]:
        """Medians; ``suffix`` tells the kinds that both clusters have apart."""
        results: list[Result] = []
        for kind, steps in self._steps.items():
            name = f"resume.{kind}{'' if kind in ('disk', 'learned') else suffix}"
            ttft_s = median(step.ttft_s for step in steps)
            results.append(Result(f"{name}_s", ttft_s, "s"))
            if kind != "cold":
                base = "cold" if kind in ("warm", "memory", "disk") else "warm"
                ratio = ttft_s / median(step.ttft_s for step in self._steps[base])
                results.append(Result(name, ratio, "1", f"resume.{base}{suffix}_s", ratio))
            for where in ("resident", "pulled"):
                tokens = median(step.moved[f"{where}_tokens"] for step in steps)
                results.append(Result(f"{name}.{where}", tokens, "tokens"))
            if suffix:
                results.append(Result(f"{name}.loaded", median(self._loaded[kind]), "blocks"))
        return results


def _sleep(seconds: float) -> None:
    asyncio.run(asyncio.sleep(max(0.0, seconds)))
