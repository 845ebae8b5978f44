"""Calls that are asked for again: against the ASGI interface, with clients that leave and come back."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
import pytest
from starlette.types import ASGIApp

from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dispatch.steps import Finished, Output, StepRequest
from router.http.access import ANYBODY, CALLER
from router.http.app import create_app
from router.http.config import ApiConfig
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.errors import PeerLost
from tracehaul.wire.steps import StepUsage

MODEL = "org/fake"
BODIES: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi", "max_tokens": 50},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 50},
}
SAID = "twelve words"


class Caller:
    """One client's request."""

    def __init__(
        self, app: ASGIApp, path: str, body: Mapping[str, Any], headers: Mapping[str, str], *, inside: bool = False
    ) -> None:
        self._app, self._path = app, path
        self._of = {CALLER: ANYBODY} if inside else {}
        self._body: bytes | None = msgspec.json.encode({"model": MODEL, **body})
        self._headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self._gone = asyncio.Event()
        self.messages: list[Any] = []
        self._got = asyncio.Event()
        self.task = asyncio.create_task(self._call())

    async def _call(self) -> None:
        scope = {"type": "http", "method": "POST", "path": self._path, "query_string": b"", "headers": self._headers}
        await self._app(scope | self._of, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.messages.append(message)
        self._got.set()

    async def until(self, count: int) -> None:
        """So many events have come."""
        while len(self.events) < count:
            self._got.clear()
            await self._got.wait()

    async def leave(self) -> None:
        self._gone.set()
        await self.task

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def events(self) -> list[str]:
        return [event for event in self.body.decode().split("\n\n")[:-1] if not event.startswith(":")]

    @property
    def last_id(self) -> str:
        return self.events[-1].partition("\n")[0].removeprefix("id: ")


class World:
    """A router, and whoever calls it."""

    def __init__(self, script: Callable[[StepRequest], Script], **config: Any) -> None:
        self.dispatcher = FakeDispatcher(script)
        self.app = self.restarted(**config)

    def restarted(self, **config: Any) -> ASGIApp:
        """Another life of it that knows its traces, and nothing else."""
        return create_app(self.dispatcher, {MODEL: FakeText()}, lambda: b"", ApiConfig(**config), InlineOffload())

    def call(self, path: str, key: str | None = "k", app: ASGIApp | None = None, **more: Any) -> Caller:
        headers = {"Idempotency-Key": key} if key else {}
        headers |= more.pop("headers", {})
        return Caller(app or self.app, path, BODIES[path] | more, headers)

    async def done(self, path: str, key: str | None = "k", app: ASGIApp | None = None, **more: Any) -> Caller:
        call = self.call(path, key, app, **more)
        await call.task
        return call

    @property
    def steps(self) -> int:
        return len(self.dispatcher.requests)


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(within())


paths = pytest.mark.parametrize("path", BODIES)
streams = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@paths
@streams
def test_an_answer_is_told_again_byte_for_byte_and_nothing_runs(path: str, stream: bool) -> None:
    async def main() -> None:
        world = World(say(SAID))
        first, again = await world.done(path, stream=stream), await world.done(path, stream=stream)
        assert first.status == again.status == 200
        assert (again.body, world.steps) == (first.body, 1)
        assert SAID in first.body.decode() or stream
        assert "idempotent-replayed" not in first.headers
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["x-trace-id"] == first.headers["x-trace-id"]
        other = await world.done(path, "other", stream=stream)
        assert (world.steps, "idempotent-replayed" in other.headers) == (2, False)

    run(main)


@paths
@streams
def test_two_that_ask_at_once_are_told_the_same_by_one_step(path: str, stream: bool) -> None:
    async def main() -> None:
        world = World(say(SAID, delay_s=0.002))
        calls = [world.call(path, stream=stream) for _ in range(3)]
        await asyncio.gather(*(call.task for call in calls))
        assert len({call.body for call in calls}) == world.steps == 1

    run(main)


@paths
def test_the_same_key_with_another_body_is_refused(path: str) -> None:
    async def main() -> None:
        world = World(say(SAID))
        await world.done(path)
        other = await world.done(path, temperature=0.5)
        assert (other.status, world.steps) == (422, 1)
        assert other.json["error"]["code"] == "idempotency_key_reused"
        assert "new key" in other.json["error"]["message"]

    run(main)


def test_keys_are_each_paths_and_tenants_own() -> None:
    async def main() -> None:
        world = World(say(SAID))
        for path in BODIES:
            assert (await world.done(path)).status == 200
        assert (await world.done("/v1/completions", cache_salt="other")).status == 200
        assert world.steps == len(BODIES) + 1

    run(main)


@paths
def test_a_stream_is_gone_on_with_from_each_of_its_events(path: str) -> None:
    async def main() -> None:
        world = World(say(SAID))
        whole = await world.done(path, stream=True)
        ids = [event.partition("\n")[0] for event in whole.events]
        assert ids == [f"id: {at}" for at in range(1, len(ids) + 1)]
        for at in range(1, len(ids) + 1):
            rest = await world.done(path, stream=True, headers={"Last-Event-ID": str(at)})
            assert rest.events == whole.events[at:]
        beyond = await world.done(path, stream=True, headers={"Last-Event-ID": "999"})
        assert (beyond.status, beyond.json["error"]["code"]) == (400, "invalid_event_id")
        assert world.steps == 1

    run(main)


def test_to_go_on_needs_the_streams_key_and_body() -> None:
    async def main() -> None:
        world = World(say(SAID))
        for key, stream in (("k", False), (None, True)):
            refused = await world.done("/v1/completions", key, stream=stream, headers={"Last-Event-ID": "1"})
            assert (refused.status, refused.json["error"]["code"]) == (400, "nothing_to_resume")
        bad = await world.done("/v1/completions", "a key")
        assert (bad.status, bad.json["error"]["code"], world.steps) == (400, "invalid_idempotency_key", 0)

    run(main)


@paths
@pytest.mark.parametrize("life", ["same", "other"])
def test_a_client_that_left_comes_back_and_has_each_event_once(path: str, life: str) -> None:
    """Within its grace the step runs on; another life of the router goes on behind the tokens that it knows."""

    async def main() -> None:
        world = World(say(SAID, delay_s=0.005), idempotency_grace_s=0.001 if life == "other" else 30.0)
        whole = await world.done(path, "another", stream=True)
        first = world.call(path, stream=True)
        await first.until(6)
        await first.leave()
        app = world.app
        if life == "other":
            await _until(lambda: world.dispatcher.running == 0)
            assert len(world.dispatcher.aborted) == 1
            app = world.restarted()
        rest = await world.done(path, app=app, stream=True, headers={"Last-Event-ID": first.last_id})
        got = first.events + rest.events
        assert [event.partition("\n")[0] for event in got] == [event.partition("\n")[0] for event in whole.events]
        assert len(got) == len(whole.events)
        sampled = [request.begun.packed for request in world.dispatcher.requests]
        assert len(sampled) == (2 if life == "same" else 3)
        assert bool(sampled[-1]) == (life == "other")
        assert len({request.sampling.seed for request in world.dispatcher.requests[1:]}) == 1

    run(main)


@paths
@streams
def test_a_restarted_router_that_knows_the_trace_samples_nothing_again(path: str, stream: bool) -> None:
    async def main() -> None:
        world = World(say(SAID))
        first = await world.done(path, stream=stream)
        again = await world.done(path, app=world.restarted(), stream=stream)
        assert world.dispatcher.requests[-1].begun.ending == "stop"
        assert _said(again) == _said(first)
        assert len([one for one in world.dispatcher.keeper.events if type(one).__name__ == "StepBegan"]) == 1

    run(main)


def test_a_call_that_failed_is_tried_again_behind_what_was_told() -> None:
    async def main() -> None:
        fails = [True]

        def script(request: StepRequest) -> Script:
            usage = StepUsage(prompt_tokens=request.prompt_tokens)
            tokens = [Output([token], usage if at == 0 else None) for at, token in enumerate(b"abcdef")]
            return [*tokens[:3], PeerLost("gone")] if fails[0] else [*tokens, Finished("stop", usage)]

        world = World(script)
        first = await world.done("/v1/completions", stream=True)
        assert '"error"' in first.events[-2]
        told = [event for event in first.events if event.startswith("id: ")]
        fails[0] = False
        last = told[-1].partition("\n")[0].removeprefix("id: ")
        rest = await world.done("/v1/completions", stream=True, headers={"Last-Event-ID": last})
        texts = [msgspec.json.decode(event.partition("data: ")[2]) for event in (told + rest.events)[:-1]]
        assert "".join(chunk["choices"][0]["text"] for chunk in texts) == "abcdef"
        assert len(world.dispatcher.requests[-1].begun.packed) == 3 * 4

    run(main)


def test_who_nobody_comes_back_for_is_ended_and_holds_nothing() -> None:
    async def main() -> None:
        world = World(say(SAID, delay_s=0.02), idempotency_grace_s=0.05, requests_max=1)
        call = world.call("/v1/completions", stream=True)
        await call.until(1)
        await call.leave()
        assert world.dispatcher.running == 1
        assert (await world.done("/v1/completions", "b")).status == 503, "what runs alone counts as a call"
        await _until(lambda: world.dispatcher.running == 0)
        await asyncio.sleep(0)
        assert (await world.done("/v1/completions", "c")).status == 200

    run(main)


def test_what_the_router_asks_itself_ends_with_who_asked_and_goes_on_when_it_is_asked_again() -> None:
    async def main() -> None:
        world = World(say(SAID, delay_s=0.005))
        body = BODIES["/v1/completions"] | {"stream": True}
        calls = [Caller(world.app, "/v1/completions", body, {"Idempotency-Key": "line"}, inside=True)]
        await calls[0].until(4)
        await calls[0].leave()
        await _until(lambda: world.dispatcher.running == 0)
        calls.append(Caller(world.app, "/v1/completions", body, {"Idempotency-Key": "line"}, inside=True))
        await calls[1].task
        assert world.dispatcher.requests[-1].begun.packed
        first, again = ([re.sub(r'"created":\d+', "", event) for event in call.events] for call in calls)
        assert again[: len(first)] == first

    run(main)


def test_several_choices_go_on_each_from_where_it_was() -> None:
    async def main() -> None:
        world = World(say(SAID, delay_s=0.001))
        whole = await world.done("/v1/completions", stream=True, n=2)
        cut = len(whole.events) // 2
        last = whole.events[cut - 1].partition("\n")[0].removeprefix("id: ")
        rest = await world.done("/v1/completions", stream=True, n=2, headers={"Last-Event-ID": last})
        assert rest.events == whole.events[cut:]

    run(main)


# --- without a key ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_a_named_trace_goes_on_behind_what_its_lost_client_had(named: bool) -> None:
    async def main() -> None:
        world = World(say(SAID, delay_s=0.005))
        headers = {"X-Trace-Id": "t"} if named else {}
        first = world.call("/v1/chat/completions", None, stream=True, headers=headers)
        await first.until(5)
        await first.leave()
        again = await world.done("/v1/chat/completions", None, headers=headers)
        begun = world.dispatcher.requests[-1].begun
        assert bool(begun.packed) == named
        assert again.json["choices"][0]["message"]["content"] == SAID
        seeds = {request.sampling.seed for request in world.dispatcher.requests}
        assert len(seeds) == (1 if named else 2)

    run(main)


def test_who_was_answered_and_asks_again_gets_another_sample() -> None:
    async def main() -> None:
        world = World(say(SAID, delay_s=0.001))
        headers = {"X-Trace-Id": "t"}
        calls = [world.call("/v1/chat/completions", None, headers=headers) for _ in range(2)]
        await asyncio.gather(*(call.task for call in calls))
        await world.done("/v1/chat/completions", None, headers=headers)
        assert not any(request.begun.packed for request in world.dispatcher.requests)
        assert len({request.sampling.seed for request in world.dispatcher.requests}) == 3

    run(main)


async def _until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.002)


def _said(call: Caller) -> str:
    """An answer without when it was made, and what it says of its output in tokens, which a fake does not count."""
    return re.sub(r'"(created|created_at|output_tokens|completion_tokens|total_tokens)":\d+', "", call.body.decode())
