"""What background work costs a router while it waits: the worker has no room for any.

Shares of a core, by the processor's time of all of the router's threads: of a router where nothing waits
(``waiting.idle``), of one where 100,000 lines of batches do (``waiting.lines``), and of one where as many calls of
``service_tier: flex`` do (``waiting.calls``). No process may open so many sockets unless its host is told so: those
calls come by the application's own interface, and ``waiting.connections`` is of fewer that came by sockets. When the
worker has room again, calls must be answered.
"""

import asyncio
import tempfile
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

CALLS, CONNECTIONS = 100_000, 15_000
LINES = 50_000
"""Of a batch, of which there are as many as it takes."""
PROMPT_TOKENS, TEXT_TOKENS = 50, 10_000
SETTLE_S = 12.0
"""Until what comes with a call's beginning is over."""
SPARE = 1000
"""Connections that may be open beside."""
GO_S = 60.0
WAIT_S = 3600.0
TIMEOUT_S = 600.0


def waiting(text: Text, console: Console, *, calls: int, connections: int, seconds: float) -> list[Result]:
    """All three. ``seconds``: each is looked at for so long."""
    api = ApiConfig(requests_max=4 * calls, connections_max=connections + SPARE, flex_wait_s=WAIT_S)
    results: list[Result] = []
    with router_alone(text, console, "bench.router.asking", api=api, traces_keep_s=0.0) as fleet:
        fleet.worker.ask(do="full", full=True)
        idle = _share(fleet, seconds)
        results += [Result("waiting.idle", idle, "share of a core")]
        for name, share in (
            ("calls", _calls(fleet, Prompts(text, TEXT_TOKENS), calls, seconds)),
            ("connections", _connections(fleet, Prompts(text, TEXT_TOKENS), connections, seconds)),
            ("lines", _lines(fleet, Prompts(text, TEXT_TOKENS), calls, seconds)),
        ):
            results += [Result(f"waiting.{name}", share, "share of a core", "waiting.idle", share / idle)]
    return results


def _share(fleet: RouterAlone, seconds: float) -> float:
    """Of a core, that the router takes while it is left alone."""
    asyncio.run(asyncio.sleep(SETTLE_S))
    before_s, began_s = fleet.cpu_s(), clock.perf_s()
    asyncio.run(asyncio.sleep(seconds))
    return (fleet.cpu_s() - before_s) / (clock.perf_s() - began_s)


def _body(fleet: RouterAlone, prompts: Prompts) -> dict[str, Any]:
    messages = fleet.opening(fleet.name(), prompts.take(PROMPT_TOKENS))
    return {"model": fleet.model, "messages": messages, "max_tokens": 1, "service_tier": "flex"}


def _calls(fleet: RouterAlone, prompts: Prompts, calls: int, seconds: float) -> float:
    with httpx.Client(base_url=f"http://127.0.0.1:{fleet.port}", timeout=TIMEOUT_S, trust_env=False) as client:
        before_mb, before_s = fleet.rss_mb(), fleet.cpu_s()
        told = client.post(PATH, json={"calls": calls, "body": _body(fleet, prompts)}).raise_for_status().json()
        assert told == {"open": calls, "answered": {}}, told
        share = _share(fleet, seconds)
        told = client.get(PATH).json()
        assert told == {"open": calls, "answered": {}}, told
        print("CALLS", share, (fleet.rss_mb() - before_mb) * 1e3 / calls, (fleet.cpu_s() - before_s) / calls * 1e3)
        fleet.worker.ask(do="full", full=False)
        ends_s = clock.perf_s() + GO_S
        while not (told := client.get(PATH).json())["answered"] and clock.perf_s() < ends_s:
            asyncio.run(asyncio.sleep(1.0))
        fleet.worker.ask(do="full", full=True)
        assert set(told["answered"]) == {"200"}, told
        told = client.delete(PATH).raise_for_status().json()
        assert told["open"] == 0, told
    return share


def _connections(fleet: RouterAlone, prompts: Prompts, connections: int, seconds: float) -> float:
    client = Client(fleet.port, b" " * 16, connections)
    request = http("POST", "/v1/chat/completions", msgspec.json.encode(_body(fleet, prompts)))
    for connection in client.connections:
        client.send(connection, request)
    share = _share(fleet, seconds)
    assert not client.poll(timeout_s=0.0), "none was answered"
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
            assert (now["status"], now["request_counts"]["completed"]) == ("in_progress", 0), now
            batch.cancel()
    return share
