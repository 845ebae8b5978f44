"""The traces' machine and the journal in one process: what writing takes, and knowing again.

``journal.cpu``: what writing adds to the processor's time of a step, all threads, at 100 steps a second, interleaved
with the same steps without a journal (what a whole router spends is in :mod:`bench.durable.cost`). ``journal.bytes``:
written of a step. ``journal.recover``: a start with 10,000 traces.
"""

import asyncio
import resource
from collections.abc import Callable
from statistics import median

import numpy as np

from bench.common.report import Result
from records.base import Records
from router.dispatch.journal import Journal
from router.policy.retention import RetentionConfig
from router.traces.contexts import Left, joined
from router.traces.decisions import Placed
from router.traces.events import Answered, Event, StepBegan, StepEnded, StepPlaced
from router.traces.machine import Traces
from router.traces.texts import Encoded, Said
from tracehaul.runtime import clock
from tracehaul.runtime.memory import settle
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.wire.hashing import chain
from tracehaul.wire.ids import BlockHash, NodeId, StepId, TraceId

PER_S = 100
BLOCK_TOKENS = 16
CHARACTERS = 4
"""Of a token."""
ROOT = BlockHash(b"r" * 32)
BYTES_MAX = 4 << 30
KEEP_S = 1e6
OFFLOAD = ThreadOffload("pack")


class Load:
    """Agents that take turns: each prompt is the last one with ``more`` tokens; contexts begin at ``tokens``."""

    def __init__(self, traces_max: int, agents: int, tokens: int, more: int, name: str) -> None:
        self.traces = Traces(traces_max, BYTES_MAX, RetentionConfig())
        self.journal: Journal | None = None
        self._agents = agents
        self._tokens = tokens
        self._more = more
        self._name = name
        self._ids = np.random.default_rng(1).integers(0, 50_000, tokens + 4096 * more, dtype="<u4").tobytes()
        self._at = 0

    def send(self, event: Event) -> None:
        """As the router's retainer does."""
        self.traces.handle(event, clock.now_s())
        if self.journal is not None:
            self.journal.changed()

    def step(self) -> None:
        """One of the next agent."""
        agent, turn = self._at % self._agents, self._at // self._agents
        self._at += 1
        tokens = self._tokens + turn * self._more
        packed = agent.to_bytes(4, "little") + self._ids[4 : 4 * tokens]
        text = f"{agent:8}" + "word" * (tokens * CHARACTERS // 4)
        key, step = ("", TraceId(f"{self._name}-{agent}")), StepId(f"{self._name}-{self._at}")
        known = self.traces.get(key)
        hashes = joined(chain(ROOT, packed, BLOCK_TOKENS))
        self.send(StepBegan(key, step, None, tokens))
        worker, home = NodeId("decode-0"), NodeId("store-0")
        placed = Placed(step, worker, "warm", tokens, tokens, worker, tokens, tokens, None, home, {"decode-0": 1})
        self.send(StepPlaced(key, placed, known.last_step if known is not None else None, takes=False))
        left = Left(step, ROOT, BLOCK_TOKENS, packed, hashes, tokens, None)
        self.send(StepEnded(key, step, "stop", self._more // 2, None, left, 1e-6, final=False))
        self.send(Answered(key, step, f"r{self._name}{self._at}", ("bash",), Said(Encoded(text, packed), model="m")))


def cpu_s() -> float:
    """Of all of this process's threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def paced(load: Load, seconds: float) -> float:
    """Processor's milliseconds of a step, at :data:`PER_S` of them a second."""
    before_s, start_s = cpu_s(), clock.now_s()
    for at in range(int(seconds * PER_S)):
        await asyncio.sleep(max(0.0, start_s + at / PER_S - clock.now_s()))
        load.step()
    await asyncio.sleep(0.3)
    return (cpu_s() - before_s) / (seconds * PER_S) * 1e3


async def cost(records: Records, kind: str, seconds: float, rounds: int) -> list[Result]:
    """``journal.cpu`` and ``journal.bytes``."""
    loads = {written: Load(100, 20, 4000, 200, f"{kind}{written:d}") for written in (False, True)}
    written = loads[True]
    written.journal = Journal(records, written.traces, written.send, KEEP_S, {}, OFFLOAD)
    await written.journal.start()
    took: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * rounds):
        took[bool(turn % 2)].append(await paced(loads[bool(turn % 2)], seconds))
    stats, steps = written.journal.stats, seconds * PER_S * rounds
    await written.journal.close()
    without, more = median(took[False]), median(took[True]) - median(took[False])
    return [
        Result(f"journal.cpu.{kind}", more, "ms", "the same steps without", median(took[True]) / without),
        Result(f"journal.core.{kind}", more * PER_S / 1e3, "share of a core at 100 steps/s"),
        Result(f"journal.bytes.{kind}", stats.bytes_written / steps / 1024, "KiB a step"),
    ]


async def recover(make: Callable[[str], Records], kind: str, traces: int, turns: int) -> list[Result]:
    """``journal.recover``."""
    load = Load(traces, traces, 1000, 100, kind)
    load.journal = Journal(make("recover"), load.traces, load.send, KEEP_S, {}, OFFLOAD)
    await load.journal.start()
    for at in range(traces * turns):
        load.step()
        if at % 100 == 0:
            await asyncio.sleep(0.01)
    while load.journal.behind:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    await load.journal.close()
    known = {trace.key: trace.context_tokens for trace in load.traces.all()}
    again = Load(traces, traces, 1000, 100, kind)
    journal = Journal(make("recover"), again.traces, again.send, KEEP_S, {}, OFFLOAD)
    settle()  # as a router does
    began_s = clock.perf_s()
    await journal.start()
    took_s = clock.perf_s() - began_s
    assert {trace.key: trace.context_tokens for trace in again.traces.all()} == known
    await journal.close()
    return [Result(f"journal.recover.{kind}", took_s, "s")]
