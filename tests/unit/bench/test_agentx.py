"""The AgentX bench: smaller recordings, where stock rules send a call, and what is made of the harness's records."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from bench.agentx.arrangements import DEFAULT, NAMES, OURS, parts_of, routing_of
from bench.agentx.balancer import SESSION, balanced, prompt_of
from bench.agentx.harness import Found, found_of, progress
from bench.agentx.recordings import smaller
from bench.agentx.results import Run, faults_of, results_of
from bench.agentx.routing import APART, PIECE, CacheAware, Sticky
from bench.common.fake_machine import Machine
from bench.common.usage import Usage
from router.http.server import serve

TRACE = {
    "id": "a",
    "block_size": 64,
    "hash_id_scope": "local",
    "tool_tokens": 160,
    "system_tokens": 40,
    "requests": [
        {"t": 0.0, "type": "n", "in": 1000, "out": 8, "hash_ids": [1, 2], "api_time": 3.2, "think_time": None},
        {
            "t": 32.0,
            "type": "subagent",
            "duration_ms": 1600,
            "tool_tokens": 32,
            "requests": [{"t": 33.6, "type": "s", "in": 16, "out": 17, "hash_ids": [3], "ttft": 1.6}],
        },
    ],
}


def test_lengths_and_times_are_divided_and_nothing_else_is() -> None:
    made = smaller(TRACE, 16, 8.0)
    first, subagent = made["requests"]
    assert (made["block_size"], made["tool_tokens"], made["system_tokens"]) == (4, 10, 2)
    assert (first["in"], first["out"], first["api_time"], first["think_time"]) == (63, 1, 0.4, None)
    assert first["hash_ids"] == [1, 2]
    assert (subagent["t"], subagent["duration_ms"], subagent["tool_tokens"]) == (4.0, 200, 2)
    assert "system_tokens" not in subagent
    (inner,) = subagent["requests"]
    assert (inner["t"], inner["in"], inner["out"], inner["ttft"]) == (4.2, 1, 2, 0.2)


def test_hash_blocks_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match="64 tokens cannot be divided by 24"):
        smaller(TRACE, 24, 24.0)


def test_a_session_stays_and_a_new_one_goes_to_the_idlest() -> None:
    rule = Sticky(3)
    assert rule.choose(b"a", b"", [2, 0, 1]) == 1
    assert rule.choose(b"a", b"", [0, 9, 0]) == 1
    assert rule.choose(b"b", b"", [0, 0, 0]) == 0, "of idle workers that with the fewest sessions"
    assert rule.choose(b"c", b"", [0, 0, 0]) == 2


def prompt(beginning: str, pieces: int) -> bytes:
    return beginning.encode() * (PIECE * pieces)


def test_the_longest_prefix_has_the_call_whoever_asks() -> None:
    rule = CacheAware(2, 100)
    assert rule.choose(b"a", prompt("x", 4), [1, 0]) == 1
    assert rule.choose(b"b", prompt("y", 4), [0, 1]) == 0
    assert rule.choose(b"c", prompt("x", 6), [0, APART]) == 1
    assert rule.choose(None, prompt("z", 6), [3, 2]) == 1, "nobody knows it: the idlest"


def test_out_of_balance_the_idlest_has_it() -> None:
    rule = CacheAware(2, 100)
    assert rule.choose(b"a", prompt("x", 4), [1, 0]) == 1
    assert rule.choose(b"a", prompt("x", 4), [0, APART + 1]) == 0


def test_a_short_match_is_none_and_what_was_long_not_used_is_forgotten() -> None:
    rule = CacheAware(2, 4)
    assert rule.choose(b"a", prompt("x", 1), [1, 0]) == 1
    assert rule.choose(b"a", prompt("x", 1) + prompt("y", 5), [0, 1]) == 0
    rule = CacheAware(2, 4)
    assert rule.choose(b"a", prompt("x", 4), [1, 0]) == 1
    assert rule.choose(b"b", prompt("y", 4), [1, 0]) == 1
    assert rule.choose(b"a", prompt("x", 4), [0, 1]) == 0


def test_workers_for_themselves_have_as_much_memory_in_all_as_ours() -> None:
    machine = Machine(decode=4, stores=2, store_bytes=64 << 20)
    for name, turns in ((OURS, True), (DEFAULT, False)):
        (ours,) = parts_of(name, machine)
        assert (ours.decode, ours.stores, ours.store_bytes, ours.dispatch.turns) == (4, 2, 64 << 20, turns)
    for name in set(NAMES) - {OURS, DEFAULT}:
        parts = parts_of(name, machine)
        assert [(part.decode, part.stores, part.store_bytes) for part in parts] == [(1, 1, 32 << 20)] * 4
        assert parts[0].kv_tokens == machine.kv_tokens
        assert parts[0].cost == machine.cost
    assert isinstance(routing_of("sticky", parts_of("sticky", machine)), Sticky)
    assert isinstance(routing_of("cache-aware", parts_of("cache-aware", machine)), CacheAware)


def test_a_prompt_is_what_the_model_reads_and_a_body_of_another_form_is_all_of_it() -> None:
    messages = [{"role": "user", "content": "hello"}]
    one, other = (json.dumps({"max_tokens": n, "messages": messages}).encode() for n in (1, 2))
    assert prompt_of(one) == prompt_of(other) == json.dumps([None, *messages]).encode()
    assert prompt_of(b"[1]") == b"[1]"
    assert prompt_of(b"\xff") == b"\xff"


async def _worker(scope: Any, receive: Any, send: Any) -> None:
    """Streams its body in two pieces, the second later."""
    assert scope["type"] == "http"
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 201, "headers": [(b"x-asked", scope["path"].encode())]})
    await send({"type": "http.response.body", "body": b"first ", "more_body": True})
    await asyncio.sleep(0.05)
    await send({"type": "http.response.body", "body": body})


async def _through(urls: list[str]) -> tuple[httpx.Response, list[bytes]]:
    async def body() -> AsyncIterator[bytes]:
        yield b"second"

    async with balanced(urls, Sticky(len(urls))) as url, httpx.AsyncClient(trust_env=False) as http:
        headers = {SESSION.decode(): "a"}
        async with http.stream("POST", f"{url}/v1/chat/completions", content=body(), headers=headers) as answer:
            return answer, [piece async for piece in answer.aiter_raw()]


def test_the_balancer_passes_a_stream_on_as_it_comes_and_says_whose_worker_is_gone() -> None:
    async def told() -> None:
        server = await serve(_worker, "127.0.0.1", 0, grace_s=1)
        url = f"http://127.0.0.1:{server.port}"
        answer, pieces = await _through([url])
        assert (answer.status_code, answer.headers["x-asked"]) == (201, "/v1/chat/completions")
        assert pieces == [b"first ", b"second"]
        await server.close()
        answer, pieces = await _through([url])
        assert answer.status_code == 502
        assert b"ConnectError" in b"".join(pieces)

    asyncio.run(told())


def test_a_caller_that_leaves_ends_its_call_at_the_worker() -> None:
    left = asyncio.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        left.set()

    async def told() -> None:
        server = await serve(endless, "127.0.0.1", 0, grace_s=1)
        async with balanced([f"http://127.0.0.1:{server.port}"], Sticky(1)) as url:
            async with httpx.AsyncClient(trust_env=False) as http, http.stream("POST", url, content=b"x") as answer:
                assert await anext(answer.aiter_raw()) == b"first"
            await asyncio.wait_for(left.wait(), 5)
        await server.close()

    asyncio.run(told())


def line(phase: str = "profiling", *, cached: int = 60, error: str | None = None) -> str:
    metrics = {"time_to_first_token": 500.0, "usage_prompt_tokens": 100, "usage_prompt_cache_read_tokens": cached}
    record: dict[str, Any] = {"metadata": {"benchmark_phase": phase}}
    record["metrics"] = {name: {"value": value} for name, value in metrics.items()}
    return json.dumps(record | ({"error": {"message": error}} if error else {}))


def test_what_is_counted_of_the_harness_is_what_was_measured() -> None:
    lines = [line("warmup"), line(), line(cached=80), line(error="gone")]
    found = found_of(lines, {"benchmark_duration": {"avg": 10.0}})
    assert found == Found(2, 1, 10.0, [0.5, 0.5], 200, 60)


def test_progress_is_what_says_how_far_it_is() -> None:
    assert progress("08:13:53.563 INFO       rps=7.3 (avg 6.6) done=247 (records_manager.py:1345)") == (
        "rps=7.3 (avg 6.6) done=247"
    )
    assert progress("08:13:53.563 INFO     Starting") is None


def run(steps: int, *, errors: int = 0, busy: float = 20.0) -> Run:
    return Run(Found(steps, errors, 36.0, [0.1] * steps, 100 * steps, 10 * steps), Usage(10.0, busy, 40.0))


def test_figures_are_of_all_runs_and_the_ratio_is_ours_over_theirs() -> None:
    figures = {one.name: one for one in results_of({"ours": [run(100), run(200)], "sticky": [run(100)]})}
    assert figures["agentx.steps_per_h.ours"].value == 15_000
    assert figures["agentx.over.sticky"].value == 1.5
    assert figures["agentx.hits.ours"].value == 0.9
    assert figures["agentx.computed.sticky"].value == 10
    assert figures["agentx.cpu.sticky"].value == 0.1
    assert figures["agentx.busy.ours"].value == 0.5
    assert "agentx.over.ours" not in figures


def test_errors_and_busy_cores_make_it_no_measurement() -> None:
    assert faults_of({"ours": [run(100)]}) == []
    assert faults_of({"ours": [run(100, errors=2)]}) == ["ours: 2 errors"]
    assert len(faults_of({"ours": [run(100, busy=39.0)]})) == 1
