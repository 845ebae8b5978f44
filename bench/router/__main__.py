"""The router's own cost: a real router in one process, a worker that computes nothing in another, all on loopback.

Prompts are conversations about the sources of Python's library. Times to first token are what the router adds: the
worker's own answer to the same step, asked without a router in the same run, is taken off. CPU is the router's alone.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from bench.common.report import Result, finish, percentile
from bench.router.client import Answer, Client, Connection, must
from bench.router.fleet import (
    ANSWER_TOKENS,
    CONNECTIONS,
    CONTEXT_MAX,
    WORD,
    Message,
    Prompts,
    RouterAlone,
    http,
    router_alone,
)
from bench.router.memory import rss
from bench.router.waiting import waiting
from tracehaul.model.source import resolve
from tracehaul.model.text import Text
from tracehaul.runtime import clock

WARM_UP = 20
"""Calls that do not count."""
REST_S = 0.002
"""After each call: what the router does once it has answered counts, too."""
RESTED_S = 0.05
"""After so long a router has lost the processor's caches to others."""
POLL_S = 0.05
LONG_TOKENS = 90_000
"""Where the long conversation begins: it passes 100k in the middle of what is measured."""
STEP_TOKENS = 1000
STREAMS = 2000
STREAM_PER_S = 20
STREAM_ENDS = 10
"""Tokens of each stream after those that count, as all end at once."""
TOLD_WITHIN_S = 0.1
STALL_PER_S = 50
STALL_SIZES = {"400k": (400_000, 200), "1m": (1_000_000, 400), "4m": (4_000_000, 400), "20m": (20_000_000, 413)}
"""Characters of a prompt, and how it is answered."""
PACKED = "20m"
"""Of that size one is sent packed, too."""
REFUSED_CHARACTERS = 4_000_000
console = Console()


class Scale(msgspec.Struct, frozen=True):
    """How much is measured."""

    short_calls: int = 300
    long_calls: int = 20
    cold_calls: int = 6
    rate_s: float = 10.0
    streams_s: float = 10.0
    stall_rounds: int = 3
    refused_calls: int = 100
    rss_traces: int = 10_000
    waiting_calls: int = 100_000
    waiting_connections: int = 15_000
    waiting_s: float = 30.0


QUICK = Scale(50, 8, 2, 3.0, 3.0, 1, 5, 200, 2000, 500, 12.0)


def until_ready(client: Client, connection: Connection) -> None:
    """A router whose loop stood still for seconds has lost its worker, which joins again soon."""
    status = 0
    while status != 200:
        client.poll(timeout_s=POLL_S)
        client.send(connection, http("GET", "/health"))
        while connection.busy:
            client.poll()
        status = connection.answer.status


# --- time to first token ------------------------------------------------------------------------------------


class Cost:
    """Calls of one kind, one at a time with a rest after each: what each took."""

    def __init__(self, fleet: RouterAlone, client: Client, rest_s: float = REST_S) -> None:
        self._fleet = fleet
        self._client = client
        self._rest_s = rest_s
        self.ttft_s: list[float] = []
        self.cpu_s: list[float] = []

    def call(self, request: bytes) -> None:
        """Another one."""
        before_s = self._fleet.cpu_s()
        answer = must(self._client.ask(request))
        self._client.poll(timeout_s=self._rest_s)
        self.cpu_s.append(self._fleet.cpu_s() - before_s)
        self.ttft_s.append(answer.told_s[0] - answer.sent_s)

    def results(self, size: str, trips_s: Sequence[float], kind: str = "") -> list[Result]:
        """``kind`` is the end of the name."""
        trip_ms, added_ms = median(trips_s) * 1e3, [(ttft_s - median(trips_s)) * 1e3 for ttft_s in self.ttft_s]
        base = f"router.trip.{size}"
        own = [] if kind else [Result(base, trip_ms, "ms")]
        return [
            *own,
            Result(f"router.ttft.{size}{kind}", median(added_ms), "ms", base, median(added_ms) / trip_ms),
            Result(f"router.ttft.{size}{kind}.p99", percentile(added_ms, 0.99), "ms"),
            Result(f"router.cpu.{size}{kind}", fmean(self.cpu_s) * 1e3, "ms"),
        ]


def conversation(fleet: RouterAlone, prompts: Prompts, tokens: int) -> list[Message]:
    """A long one, in messages of a thousand tokens."""
    messages = fleet.opening(fleet.name(), prompts.take(STEP_TOKENS))
    for _ in range((tokens // STEP_TOKENS - 1) // 2):
        messages.append({"role": "assistant", "content": prompts.take(STEP_TOKENS)})
        messages.append({"role": "user", "content": prompts.take(STEP_TOKENS)})
    return messages


def ttft(fleet: RouterAlone, prompts: Prompts, scale: Scale) -> list[Result]:
    """1k tokens, one call after the other and after rests; 100k tokens, of which the last step had 99 %; 100k tokens
    that nobody knows."""
    client = fleet.client()
    warm_up, short, long, cold = (Cost(fleet, client) for _ in range(4))
    rested = Cost(fleet, client, RESTED_S)
    for cost in [warm_up] * WARM_UP + [short] * scale.short_calls + [rested] * scale.short_calls:
        cost.call(fleet.request(fleet.opening(fleet.name(), prompts.take(STEP_TOKENS - 50)), ANSWER_TOKENS))
    trips_s = fleet.trips(STEP_TOKENS, scale.short_calls)
    results = short.results("1k", trips_s) + rested.results("1k", trips_s, ".rested")
    trace, messages = fleet.name(), conversation(fleet, prompts, LONG_TOKENS)
    must(client.ask(fleet.request(messages, ANSWER_TOKENS, trace)))
    for _ in range(scale.long_calls):
        messages.append({"role": "assistant", "content": WORD * ANSWER_TOKENS})
        messages.append({"role": "user", "content": prompts.take(STEP_TOKENS)})
        long.call(fleet.request(messages, ANSWER_TOKENS, trace))
    check_warm(client, trace)
    trips_s = fleet.trips(100 * STEP_TOKENS, scale.long_calls)
    results += long.results("100k", trips_s)
    for _ in range(scale.cold_calls):
        messages = conversation(fleet, prompts, 100 * STEP_TOKENS)
        cold.call(fleet.request(messages, ANSWER_TOKENS, fleet.name()))
    return results + cold.results("100k", trips_s, ".cold")


def check_warm(client: Client, trace: str) -> None:
    """The last step of the long conversation was what it should be: long, and known."""
    answer = client.ask(http("GET", f"/v1/traces/{trace}"))
    step = max(msgspec.json.decode(answer.body)["steps"], key=lambda step: step["prompt_tokens"])
    share = step["hits"]["theoretical"] / step["prompt_tokens"]
    if share < 0.985 or not 80_000 < step["prompt_tokens"] < CONTEXT_MAX:
        raise RuntimeError(f"{share:.3f} of {step['prompt_tokens']} tokens were known")


# --- many at once -------------------------------------------------------------------------------------------


def rate(fleet: RouterAlone, prompts: Prompts, scale: Scale) -> list[Result]:
    """Calls of 1k tokens as fast as the router takes them, on one core."""
    fleet.pin()
    client = fleet.client(CONNECTIONS)
    ended: list[float] = []
    ends_s = clock.perf_s() + 1.0

    def following(_: int, last: Answer | None) -> bytes | None:
        if last is not None:
            ended.append(must(last).ended_s)
        if clock.perf_s() > ends_s:
            return None
        return fleet.request(fleet.opening(fleet.name(), prompts.take(STEP_TOKENS - 50)), ANSWER_TOKENS)

    client.each(following)  # to warm up
    ended.clear()
    before_s, began_s = fleet.cpu_s(), clock.perf_s()
    ends_s = began_s + scale.rate_s
    client.each(following)
    took_s, cpu_s = clock.perf_s() - began_s, fleet.cpu_s() - before_s
    return [
        Result("router.rate.1k", len(ended) / took_s, "1/s"),
        Result("router.rate.busy", cpu_s / took_s, "1"),
        Result("router.rate.1k.cpu", len(ended) / cpu_s, "1/s"),  # what it would be if nobody else took the core
    ]


def streams(fleet: RouterAlone, prompts: Prompts, scale: Scale) -> list[Result]:
    """Open streams, all at the same pace; the router has a core of its own."""
    fleet.pin()
    client = fleet.client(STREAMS)
    each = int(STREAM_PER_S * scale.streams_s)
    fleet.worker.ask(do="pace", per_s=STREAM_PER_S)
    names = [fleet.name() for _ in client.connections]
    text = prompts.take(100)
    opening: list[Connection] = []
    for name, connection in zip(names, client.connections, strict=True):
        client.send(connection, fleet.request(fleet.opening(name, text), 1 + each + STREAM_ENDS, name))
        opening.append(connection)
        while len(opening) > CONNECTIONS:
            client.poll()
            opening = [connection for connection in opening if not connection.answer.told_s]
    while any(not connection.answer.told_s for connection in opening):
        client.poll()
    before_s = fleet.cpu_s()
    fleet.worker.ask(do="go")
    client.wait()
    cpu_s = fleet.cpu_s() - before_s
    after_sent: list[float] = []
    after_due: list[float] = []
    times = fleet.worker.ask(do="times")
    for name, connection in zip(names, client.connections, strict=True):
        due_s, sent_s = times[name]
        told_s = must(connection.answer).told_s[1 : 1 + each]
        after_sent += [told - sent for told, sent in zip(told_s, sent_s, strict=False)]
        after_due += [told - due for told, due in zip(told_s, due_s, strict=False)]
    planned = STREAMS * each
    return [
        Result("router.streams", sum(late <= TOLD_WITHIN_S for late in after_sent) / planned, "1"),
        Result("router.streams.due", sum(late <= TOLD_WITHIN_S for late in after_due) / planned, "1"),
        Result("router.streams.p50", percentile(after_due, 0.5) * 1e3, "ms"),
        Result("router.streams.p99", percentile(after_due, 0.99) * 1e3, "ms"),
        Result("router.streams.told", len(after_sent) / planned, "1"),
        Result("router.cpu.token", cpu_s / (STREAMS * (each + STREAM_ENDS)) * 1e6, "us"),
    ]


# --- what others notice, and what is left -------------------------------------------------------------------


def stall(fleet: RouterAlone, prompts: Prompts, scale: Scale) -> list[Result]:
    """The longest gap of an open stream: alone, and while another client posts long prompts."""
    client = fleet.client(2)
    stream, other = client.connections
    fleet.worker.ask(do="pace", per_s=STALL_PER_S)
    name = fleet.name()
    client.send(stream, fleet.request(fleet.opening(name, prompts.take(STEP_TOKENS)), CONTEXT_MAX // 2, name))
    while not stream.answer.told_s:
        client.poll()
    fleet.worker.ask(do="go")

    def follow(seconds: float) -> None:
        ends_s = clock.perf_s() + seconds
        while clock.perf_s() < ends_s:
            client.poll()

    def gap_ms(post: bytes | None, status: int) -> float:
        """The longest from before the call until a second after it."""
        follow(0.1)  # words that came while the call was made up were not read
        at = len(stream.answer.told_s) - 1
        if post is not None:
            until_ready(client, other)
            client.send(other, post)
        while other.busy:
            client.poll()
        if post is not None:
            must(other.answer, status)
        follow(1.0)
        told_s = stream.answer.told_s[at:]
        return max(after - before for before, after in pairwise(told_s)) * 1e3

    gap_ms(None, 200)
    results = [Result("router.stall.idle", gap_ms(None, 200), "ms")]
    for size, (characters, status) in STALL_SIZES.items():
        gaps: list[float] = []
        for _ in range(scale.stall_rounds):
            messages = fleet.opening(fleet.name(), prompts.characters(characters))
            gaps.append(gap_ms(fleet.request(messages, 1), status))
        results.append(Result(f"router.stall.{size}", max(gaps), "ms"))
    packed: list[float] = []
    characters, status = STALL_SIZES[PACKED]
    for _ in range(scale.stall_rounds):
        messages = fleet.opening(fleet.name(), prompts.characters(characters))
        packed.append(gap_ms(fleet.request(messages, 1, packed=True), status))
    results.append(Result(f"router.stall.{PACKED}.gzip", max(packed), "ms"))
    client.close()
    worst = max(result.value for result in results)
    return [Result("router.stall", worst, "ms", "router.stall.idle", worst / results[0].value), *results]


def refused(fleet: RouterAlone, prompts: Prompts, scale: Scale) -> list[Result]:
    """What calls that are far too long leave behind."""
    client = fleet.client()
    took_s: list[float] = []
    for tokens in [STEP_TOKENS] * WARM_UP + [100 * STEP_TOKENS] * 2:  # what calls that are served need is not counted
        must(client.ask(fleet.request(conversation(fleet, prompts, tokens), ANSWER_TOKENS)))
    before_mb = fleet.rss_mb()
    for _ in range(scale.refused_calls):
        text = prompts.characters(REFUSED_CHARACTERS)
        until_ready(client, client.connections[0])
        answer = must(client.ask(fleet.request(fleet.opening(fleet.name(), text), ANSWER_TOKENS)), 400)
        took_s.append(answer.ended_s - answer.sent_s)
    client.poll(timeout_s=1.0)
    return [
        Result("router.refused", fleet.rss_mb() - before_mb, "MB"),
        Result("router.refused.before", before_mb, "MB"),
        Result("router.refused.time", median(took_s) * 1e3, "ms"),
    ]


FIGURES: dict[str, tuple[Callable[[RouterAlone, Prompts, Scale], list[Result]], int]] = {
    "ttft": (ttft, 400_000),
    "rate": (rate, 400_000),
    "streams": (streams, 10_000),
    "stall": (stall, 1_100_000),
    "refused": (refused, 1_100_000),
    "rss": (lambda fleet, prompts, scale: rss(fleet, prompts, scale.rss_traces), 400_000),
}
"""Each with the tokens of text that it goes round in."""
WAITING = "waiting"
"""The figure whose router is another: see :mod:`bench.router.waiting`."""


def main(
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"{', '.join((*FIGURES, WAITING))}; all if not given.")] = None,
    quick: Annotated[
        bool, typer.Option(help="Fewer calls, shorter runs, 5 refusals, 200 traces, 2,000 that wait.")
    ] = False,
) -> None:
    """Measure the router beside a fake worker on this machine."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that no process is left behind
    scale = QUICK if quick else Scale()
    text = Text.load(resolve())
    config: dict[str, Any] = msgspec.to_builtins(scale) | {
        "context_max": CONTEXT_MAX,
        "load_before": os.getloadavg()[0],
    }
    results: list[Result] = []
    for name in only or (*FIGURES, WAITING):
        if name == WAITING:
            results += waiting(
                text, console, scale.waiting_calls, connections=scale.waiting_connections, seconds=scale.waiting_s
            )
            continue
        figure, tokens = FIGURES[name]
        with console.status(name), router_alone(text, console) as fleet:
            results += figure(fleet, Prompts(text, tokens), scale)
    finish(config, results, json, console)


if __name__ == "__main__":
    typer.run(main)
