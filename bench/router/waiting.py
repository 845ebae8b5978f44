"""What background work costs a router while it waits: the worker has no room for any.

Shares of a core, by the processor's time of all of the router's threads: of a router where nothing waits
(``waiting.idle``), of one where 100,000 lines of batches do (``waiting.lines``), and of one where as many calls of
``service_tier: flex`` do (``waiting.calls``). No process may open so many sockets unless its host is told so: those
calls come by the application's own interface, and ``waiting.connections`` is of fewer that came by sockets. What a call
takes to begin is in ``waiting.calls.begin``. When the worker has room again, calls must be answered.
"""

import asyncio
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console

from bench.common.report import Result
from bench.durable.batches import Batch, line
from bench.router.asking import PATH
from bench.router.client import Client
from bench.router.fleet import Prompts, RouterAlone, http, router_alone
from router.http.config import ApiConfig
from tracehaul.model.text import Text
from tracehaul.runtime import clock

CORE = "share of a core"
PARTY = 1000
"""Calls that begin together."""
LINES = 50_000
"""Of a batch, of which there are as many as it takes."""
PROMPT_TOKENS, TEXT_TOKENS = 50, 10_000
SETTLE_S = 12.0
"""Until what comes with a call's beginning is over."""
SPARE = 1000
"""Connections that may be open beside."""
MET_SHARE = 0.01
"""So many may be answered: a worker that was lost, on a busy machine, and joins again has room until it is heard."""
GO_S = 60.0
WAIT_S = 3600.0
TIMEOUT_S = 600.0


def waiting(text: Text, console: Console, calls: int, *, connections: int, seconds: float) -> list[Result]:
    """All of them. ``seconds``: each is looked at for so long."""
    api = ApiConfig(requests_max=4 * calls, connections_max=connections + SPARE, flex_wait_s=WAIT_S)
    with router_alone(text, console, "bench.router.asking", api=api, traces_keep_s=0.0) as fleet:
        fleet.worker.ask(do="full", full=True)
        prompts = Prompts(text, TEXT_TOKENS)
        idle = _share(fleet, seconds)
        connected = _connections(fleet, prompts, connections, seconds)
        lines = _lines(fleet, prompts, calls, seconds)
        before_mb, before_s = fleet.rss_mb(), fleet.cpu_s()
        with _asked(fleet, prompts, calls) as asking:
            began_s, more_mb = fleet.cpu_s() - before_s, fleet.rss_mb() - before_mb
            waits = _share(fleet, seconds)
            assert asking.get(PATH).json()["open"] >= (1 - MET_SHARE) * calls
            _go(fleet, asking)
    shares = {"lines": lines, "calls": waits, "connections": connected}
    return [
        Result("waiting.idle", idle, CORE),
        *(Result(f"waiting.{name}", share, CORE, "waiting.idle", share / idle) for name, share in shares.items()),
        Result("waiting.calls.begin", began_s * 1e3 / calls, "ms"),
        Result("waiting.calls.memory", more_mb * 1e3 / calls, "kB"),
    ]


def _share(fleet: RouterAlone, seconds: float) -> float:
    """Of a core, that the router takes while it is left alone."""
    asyncio.run(asyncio.sleep(SETTLE_S))
    before_s, began_s = fleet.cpu_s(), clock.perf_s()
    asyncio.run(asyncio.sleep(seconds))
    return (fleet.cpu_s() - before_s) / (clock.perf_s() - began_s)


def _body(fleet: RouterAlone, prompts: Prompts) -> dict[str, Any]:
    messages = fleet.opening(fleet.name(), prompts.take(PROMPT_TOKENS))
    return {"model": fleet.model, "messages": messages, "max_tokens": 1, "service_tier": "flex"}


@contextmanager
def _asked(fleet: RouterAlone, prompts: Prompts, calls: int) -> Generator[httpx.Client, None, None]:
    """So many calls wait, as long as the router lives."""
    with httpx.Client(base_url=f"http://127.0.0.1:{fleet.port}", timeout=TIMEOUT_S, trust_env=False) as client:
        for _ in range(0, calls, PARTY):
            client.post(PATH, json={"calls": PARTY, "body": _body(fleet, prompts)}).raise_for_status()
        yield client


def _go(fleet: RouterAlone, asking: httpx.Client) -> None:
    """The worker has room: calls are answered."""
    fleet.worker.ask(do="full", full=False)
    ends_s = clock.perf_s() + GO_S
    before = answered = asking.get(PATH).json()["answered"]
    while answered == before and clock.perf_s() < ends_s:
        asyncio.run(asyncio.sleep(0.5))
        answered = asking.get(PATH).json()["answered"]
    assert answered != before, "none goes"
    assert set(answered) == {"200"}, answered


def _connections(fleet: RouterAlone, prompts: Prompts, connections: int, seconds: float) -> float:
    client = Client(fleet.port, b" " * 16, connections)
    request = http("POST", "/v1/chat/completions", msgspec.json.encode(_body(fleet, prompts)))
    for connection in client.connections:
        client.send(connection, request)
    share = _share(fleet, seconds)
    while client.poll(timeout_s=0.0):
        pass
    assert sum(connection.busy for connection in client.connections) >= (1 - MET_SHARE) * connections
    client.close()
    return share


def _lines(fleet: RouterAlone, prompts: Prompts, lines: int, seconds: float) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calls.jsonl"
        each = min(lines, LINES)
        prompt = prompts.take(PROMPT_TOKENS)
        path.write_bytes(b"".join(line(fleet.model, at, prompt, max_tokens=1) for at in range(each)))
        batches = [Batch(fleet.port, path) for _ in range(-(-lines // each))]
        while any(batch.now()["status"] == "validating" for batch in batches):
            asyncio.run(asyncio.sleep(0.5))
        share = _share(fleet, seconds)
        for batch in batches:
            now = batch.now()
            assert now["status"] == "in_progress", now
            assert now["request_counts"]["completed"] <= MET_SHARE * each, now
            batch.cancel()
    return share
