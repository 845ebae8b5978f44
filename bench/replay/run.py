"""The loop of a replay: sends what is due, and tells the schedule what ended."""

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

import httpx
import msgspec

from bench.replay.endpoint import Affinity, Endpoint, Form, Prompts, candidate_forms, probe, served_model
from bench.replay.hits import Bound, theoretical
from bench.replay.recording import Trace
from bench.replay.records import Hits, StepRecord, hits
from bench.replay.schedule import Completed, Pacing, Scheduler, Sending
from bench.replay.tokens import packed_prompt
from tracehaul.runtime import clock

WARM_UP_REQUESTS = 4
TICK_S = 1.0


class Target(msgspec.Struct, frozen=True):
    """Which server, and how it is asked."""

    url: str
    """Without /v1."""
    model: str | None = None
    """None: the first that the server names."""
    prompts: Prompts | None = None
    """None: found out."""
    salt: str = ""
    affinity: Affinity = "trace"
    timeout_s: float = 600.0
    """Of one step."""
    api_key: str | None = None
    block_tokens: int = 32
    """Of the server's cache."""


class Progress(NamedTuple):
    """How far a replay is."""

    elapsed_s: float
    steps: int
    """In all."""
    running: int
    completed: Sequence[Completed]
    records: Sequence[StepRecord]
    """Steps that ended."""


class Outcome(NamedTuple):
    """A finished replay."""

    form: Form
    wall_s: float
    records: list[StepRecord]
    """In the order in which they were sent."""
    completed: list[Completed]
    bounds: list[Bound]
    """Of hits, for each record."""
    hits: Hits | None


async def replay(
    traces: Sequence[Trace],
    pacing: Pacing,
    target: Target,
    observe: Callable[[Progress], None] = lambda progress: None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> Outcome:
    """Run the traces against the server; failed steps are recorded, and their traces go on.

    Raises:
        NoEndpoint: there is no such server.
    """
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(target.timeout_s, connect=10.0)
    async with httpx.AsyncClient(
        base_url=target.url.rstrip("/").removesuffix("/v1"),
        headers=headers,
        limits=limits,
        timeout=timeout,
        trust_env=False,
        transport=transport,
    ) as http:
        model = target.model or await served_model(http)
        form = await probe(http, model, candidate_forms(target.prompts, traces))
        endpoint = Endpoint(http, model, form, salt=target.salt, affinity=target.affinity, timeout_s=target.timeout_s)
        await endpoint.warm_up(WARM_UP_REQUESTS)
        schedule = Scheduler(traces, pacing)
        began_s = clock.perf_s()
        sent = await _send_all(schedule, endpoint, began_s, observe)
        wall_s = clock.perf_s() - began_s
    sent.sort(key=lambda pair: pair[1].sent_s)
    records = [record for _, record in sent]
    prompts = [(sending.trace.trace, packed_prompt(sending.step.prompt, target.salt)) for sending, _ in sent]
    bounds = theoretical(prompts, target.block_tokens)
    found = hits(records, bounds, [len(packed) // 4 for _, packed in prompts])
    return Outcome(form, wall_s, records, schedule.completed, bounds, found)


async def _send_all(
    schedule: Scheduler, endpoint: Endpoint, began_s: float, observe: Callable[[Progress], None]
) -> list[tuple[Sending, StepRecord]]:
    sent: list[tuple[Sending, StepRecord]] = []
    records: list[StepRecord] = []
    running: dict[asyncio.Task[StepRecord], Sending] = {}
    try:
        while not schedule.done:
            for sending in schedule.due(clock.perf_s() - began_s):
                running[asyncio.create_task(endpoint.send(sending, began_s))] = sending
            now_s = clock.perf_s() - began_s
            observe(Progress(now_s, schedule.steps, len(running), schedule.completed, records))
            wait_s = TICK_S if schedule.next_s is None else min(TICK_S, max(0.0, schedule.next_s - now_s))
            if not running:
                await asyncio.sleep(wait_s)
                continue
            ended, _ = await asyncio.wait(running, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                sending = running.pop(task)
                records.append(task.result())
                sent.append((sending, records[-1]))
                schedule.ended(sending.trace.trace, clock.perf_s() - began_s)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return sent
