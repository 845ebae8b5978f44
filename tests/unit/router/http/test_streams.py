"""Streams, silence and clients that leave: against the ASGI interface itself, event by event."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from router.calls.fakes import IM_END, FakeDispatcher, FakeText, say
from router.dispatch.steps import Finished, Output
from router.http.app import create_app
from router.http.asgi import CHUNKS
from router.http.config import ApiConfig
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.errors import PeerLost
from tracehaul.wire.steps import StepUsage

CHAT: dict[str, Any] = {"model": "org/fake", "messages": [{"role": "user", "content": "hi"}], "stream": True}
TEXT: dict[str, Any] = {"model": "org/fake", "prompt": "hi", "stream": True}


class Client:
    """One HTTP call whose client can leave, or stop reading."""

    chunks = False
    """The server can send parts without waiting."""

    def __init__(self, dispatcher: FakeDispatcher, body: Any, path: str, config: ApiConfig) -> None:
        self._app = create_app(dispatcher, {"org/fake": FakeText()}, lambda: b"", config, InlineOffload())
        self._body = msgspec.json.encode(body)
        self._path = path
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self.messages: list[dict[str, Any]] = []
        self._inbox: list[dict[str, Any]] = [{"type": "http.request", "body": self._body, "more_body": False}]

    async def call(self) -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "headers": [(b"x-trace-id", b"t")],
            "scheme": "http",
            "server": ("test", 80),
            "extensions": {CHUNKS: Chunks(self)} if self.chunks else {},
        }
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._inbox:
            return self._inbox.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        self.messages.append(message)

    @property
    def status(self) -> int | None:
        return self.messages[0]["status"] if self.messages else None

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.messages[1:]).decode()

    @property
    def events(self) -> list[Any]:
        """Data of every event; comments left out."""
        blocks = self.text.split("\n\n")
        assert blocks[-1] == "", "every event ends with an empty line"
        data = [block.removeprefix("data: ") for block in blocks[:-1] if not block.startswith(":")]
        return [item if item == "[DONE]" else msgspec.json.decode(item) for item in data]


class Chunks:
    """Implements :class:`router.http.asgi.Chunks`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def writable(self) -> bool:
        return self._client.reads.is_set() and len(self._client.messages) > 0

    def write(self, data: bytes) -> None:
        assert self.writable
        self._client.messages.append({"type": "http.response.body", "body": data, "more_body": True})


@pytest.fixture(autouse=True, params=[False, True], ids=["sends", "chunks"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "chunks", request.param)


def run(
    dispatcher: FakeDispatcher,
    body: Any,
    path: str = "/v1/chat/completions",
    config: ApiConfig | None = None,
    during: Callable[[Client, "asyncio.Task[None]"], Awaitable[None]] | None = None,
) -> Client:
    async def main() -> Client:
        client = Client(dispatcher, body, path, config or ApiConfig())
        async with asyncio.timeout(20):
            task = asyncio.create_task(client.call())
            if during is not None:
                await during(client, task)
            await task
        return client

    return asyncio.run(main())


def content(events: list[Any], index: int = 0) -> str:
    choices = [c for event in events[:-1] for c in event["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


def test_a_chat_stream() -> None:
    client = run(FakeDispatcher(say("héllo")), CHAT)
    assert client.status == 200
    headers = dict(client.messages[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-cache"
    assert headers[b"x-trace-id"] == b"t"
    events = client.events
    assert events.count("[DONE]") == 1
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all("role" not in delta for delta in deltas[1:])
    assert content(events) == "héllo"
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)


def test_tokens_are_sent_as_they_come() -> None:
    async def during(client: Client, task: "asyncio.Task[None]") -> None:
        await until(lambda: client.messages != [] and content([*client.events, 0]) == "h")
        assert not task.done()
        client.gone.set()

    dispatcher = FakeDispatcher(lambda request: [Output([104]), 60.0])
    run(dispatcher, CHAT, during=during)
    assert dispatcher.running == 0


def test_a_text_stream() -> None:
    client = run(FakeDispatcher(say("hello", reason="length")), TEXT | {"return_token_ids": True}, "/v1/completions")
    events = client.events
    assert content(events) == "hello"
    choices = [event["choices"][0] for event in events[:-1]]
    assert choices[0]["prompt_token_ids"] == list(b"hi")
    assert all("prompt_token_ids" not in choice for choice in choices[1:])
    assert [token for choice in choices for token in choice["token_ids"]] == list(b"hello")
    assert [choice["finish_reason"] for choice in choices] == [None] * 5 + ["length"]


def test_chat_streams_token_ids_if_asked() -> None:
    events = run(FakeDispatcher(say("é")), CHAT | {"return_token_ids": True}).events
    assert "prompt_token_ids" in events[0]
    assert all("prompt_token_ids" not in event for event in events[1:-1])
    ids = [token for event in events[:-1] for choice in event["choices"] for token in choice.get("token_ids", [])]
    assert ids == [*"é".encode(), IM_END]


def test_usage_is_one_last_chunk() -> None:
    events = run(FakeDispatcher(say("hello")), CHAT | {"stream_options": {"include_usage": True}}).events
    *chunks, last, done = events
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == last["usage"]["prompt_tokens"] // 2


def test_usage_can_be_continuous() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = run(FakeDispatcher(say("abc")), CHAT | {"stream_options": options}).events
    counts = [event["usage"]["completion_tokens"] for event in events[:-1]]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 4)


def test_choices_each_have_a_role_a_text_and_one_reason() -> None:
    events = run(FakeDispatcher(lambda r: say(r.step[-1] * 3)(r)), CHAT | {"n": 3}).events
    for index in range(3):
        choices = [c for event in events[:-1] for c in event["choices"] if c["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert content(events, index) == str(index) * 3
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]
        assert choices[-1]["finish_reason"] == "stop"


def test_a_stop_string_across_chunks_is_left_out() -> None:
    dispatcher = FakeDispatcher(say("one END two, and much more", delay_s=0.002))
    events = run(dispatcher, CHAT | {"stop": [" END"], "stream_options": {"include_usage": True}}).events
    assert content(events[:-1]) == "one"
    assert events[-2]["usage"]["completion_tokens"] == len("one END")
    assert dispatcher.aborted == [dispatcher.requests[0].step]


def test_what_looked_like_a_stop_string_comes_in_the_end() -> None:
    assert content(run(FakeDispatcher(say("one EN")), CHAT | {"stop": "END"}).events) == "one EN"


def test_a_stop_string_in_one_choice_leaves_the_others_running() -> None:
    dispatcher = FakeDispatcher(lambda r: say("aXb" if r.step.endswith("-0") else "ab", delay_s=0.002)(r))
    events = run(dispatcher, CHAT | {"n": 2, "stop": "X"}).events
    assert (content(events, 0), content(events, 1)) == ("a", "ab")


def test_an_error_after_the_first_token_is_an_event() -> None:
    dispatcher = FakeDispatcher(lambda request: [Output([104]), PeerLost("gone")])
    client = run(dispatcher, CHAT)
    assert client.status == 200
    *chunks, error, done = client.events
    assert content([*chunks, 0]) == "h"
    assert error == {"error": {"message": "gone", "type": "service_unavailable", "param": None, "code": "peer_lost"}}
    assert done == "[DONE]"
    assert not client.messages[-1]["more_body"]


def test_silence_starts_the_stream_and_is_filled_with_comments() -> None:
    dispatcher = FakeDispatcher(lambda request: [0.2, *say("hello")(request)])
    client = run(dispatcher, CHAT, config=ApiConfig(keepalive_s=0.05))
    assert client.messages[1]["body"].startswith(b":")
    assert content(client.events) == "hello"
    late = run(FakeDispatcher(lambda request: [0.2, PeerLost("gone")]), CHAT, config=ApiConfig(keepalive_s=0.05))
    assert late.status == 200
    assert late.events[0]["error"]["code"] == "peer_lost"


def test_a_client_that_leaves_aborts_its_steps() -> None:
    scripts: dict[str, Any] = {
        "before the first token": lambda request: [60.0],
        "in mid-stream": lambda request: [Output([104]), 60.0],
    }
    for stream in (True, False):
        for running, (when, script) in enumerate(scripts.items(), start=1):
            dispatcher = FakeDispatcher(script)

            async def during(
                client: Client, task: "asyncio.Task[None]", dispatcher: Any = dispatcher, running: int = running
            ) -> None:
                # The second choice waits for the first to have computed the prompt.
                await until(lambda: dispatcher.running == running)
                await asyncio.sleep(0.01)
                client.gone.set()
                async with asyncio.timeout(1):
                    await task

            run(dispatcher, CHAT | {"stream": stream, "n": 2}, during=during)
            assert (dispatcher.running, len(dispatcher.aborted)) == (0, running), (when, stream)


def test_a_client_that_stops_reading_is_taken_for_gone() -> None:
    async def during(client: Client, task: "asyncio.Task[None]") -> None:
        await until(lambda: len(client.messages) > 2)
        client.reads.clear()

    dispatcher = FakeDispatcher(say("x" * 1000, delay_s=0.001))
    run(dispatcher, CHAT, config=ApiConfig(send_timeout_s=0.1), during=during)
    assert (dispatcher.running, len(dispatcher.aborted)) == (0, 1)


def test_a_body_that_never_ends_is_given_up() -> None:
    async def main() -> None:
        client = Client(FakeDispatcher(say("x")), CHAT, "/v1/chat/completions", ApiConfig(body_timeout_s=0.05))
        client._inbox = [{"type": "http.request", "body": b"{", "more_body": True}]
        async with asyncio.timeout(5):
            await client.call()
        assert client.status == 408
        assert (b"connection", b"close") in client.messages[0]["headers"]

    asyncio.run(main())


def test_a_client_that_leaves_while_sending_is_let_go() -> None:
    async def main() -> None:
        client = Client(FakeDispatcher(say("x")), CHAT, "/v1/chat/completions", ApiConfig())
        client._inbox = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
        await client.call()
        assert client.messages == []

    asyncio.run(main())


def test_the_servers_end_is_told() -> None:
    async def during(client: Client, task: "asyncio.Task[None]") -> None:
        await until(lambda: len(client.messages) > 1)
        task.cancel()

    dispatcher = FakeDispatcher(lambda request: [Output([104]), 60.0])
    client = run(dispatcher, CHAT, during=during)
    assert client.events[-2]["error"]["message"] == "the server is stopping"
    assert dispatcher.running == 0


def test_a_step_that_cancels_itself_is_an_error() -> None:
    class Odd(FakeDispatcher):
        async def run(self, request: Any, tell: Any = None) -> Any:
            raise asyncio.CancelledError
            yield

    assert run(Odd(say("x")), CHAT).status == 500


def test_many_tokens_at_once_are_one_piece() -> None:
    dispatcher = FakeDispatcher(
        lambda r: [Output(list(b"hello ")), Output(list(b"there")), Finished("length", StepUsage())]
    )
    events = run(dispatcher, CHAT).events
    assert [event["choices"][0]["delta"].get("content") for event in events[:-1]] == ["", "hello ", "there", None]
