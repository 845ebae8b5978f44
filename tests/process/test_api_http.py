"""The HTTP surface over real sockets: uvicorn on uvloop, OpenAI's own client, and clients of ill will."""

import asyncio
import json
import re
import socket
import threading
import time  # noqa: TID251 - the tests measure what a client sees
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import openai
import pydantic
import pytest
import uvloop

from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dispatch.steps import Output, StepRequest
from router.http.app import create_app
from router.http.config import ApiConfig
from router.http.server import serve
from tests.waiting import wait_until
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.wire.errors import Overloaded
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.steps import StepUsage

CHAT: dict[str, Any] = {"model": "org/fake", "messages": [{"role": "user", "content": "hi"}]}


MUCH = 20_000
SOON_S = 20.0
"""Far sooner than the script's answers end by themselves, which is after a minute."""
"""Numbers that a model counts to, told faster than they are read."""
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Event(pydantic.BaseModel):
    """What a client may want an answer to be."""

    name: str
    people: list[str]


def script(request: StepRequest) -> Script:
    """What the prompt's last user message asks for."""
    asked = FakeText().stream().push(unpack_tokens(request.prompt))
    if "forever" in asked:
        return [
            Output([120], StepUsage(computed_from=1)),
            *(item for _ in range(6000) for item in (0.01, Output([120]))),
        ]
    if "much" in asked:
        return [item for at in range(MUCH) for item in (Output(list(b"%d " % at)), 0.0)]
    if "never" in asked:
        return [60.0]
    if "overload" in asked:
        return [Overloaded("all queues are full")]
    if "slow" in asked:
        return say("one two three", delay_s=0.02)(request)
    if "weather" in asked:
        return say(f"One moment.\n{CALL}\n{CALL}")(request)
    if "event" in asked:
        return say('{"name": "Science Fair", "people": ["Alice", "Bob"]}')(request)
    return say("héllo 🙂")(request)


class Cluster:
    """A served fake, on a thread with a loop of its own."""

    def __init__(self, config: ApiConfig) -> None:
        self.dispatcher = FakeDispatcher(script)
        self._config = config
        self._started = threading.Event()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self.port = 0

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        offload = ThreadOffload("tokenize")
        app = create_app(self.dispatcher, {"org/fake": FakeText()}, lambda: b"", self._config, offload)
        server = await serve(app, "127.0.0.1", 0, grace_s=1)
        self.port = server.port
        self._stop = asyncio.Event()
        self._started.set()
        await self._stop.wait()
        await server.close()
        offload.close()
        assert self.dispatcher.running == 0, "closing the server ends what runs"

    def __enter__(self) -> "Cluster":
        self._thread.start()
        assert self._started.wait(20)
        return self

    def stop(self) -> None:
        with suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._stop.set)

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(ApiConfig(body_bytes_max=4 * 2**20)) as running:
        yield running
        # Whatever the tests did to it, it must still work and hold nothing.
        wait_until(lambda: running.dispatcher.running == 0, SOON_S)
        assert httpx.post(f"{running.url}/v1/chat/completions", json=CHAT).status_code == 200


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return CHAT | {"messages": [{"role": "user", "content": text}]} | fields


def test_openai_client_on_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ask("hi"), max_completion_tokens=50, seed=1, n=2)
    assert [choice.message.content for choice in answer.choices] == ["héllo 🙂"] * 2
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 2
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens // 2
    assert answer.usage.model_extra is not None
    assert answer.usage.model_extra["tracehaul"]["pulled_bytes"] == 14


def test_openai_client_on_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(**ask("slow"), stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "one two three"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 14
    with client.chat.completions.stream(**ask("slow")) as helper:
        assert helper.get_final_completion().choices[0].message.content == "one two three"


def test_openai_client_on_completions_and_models(client: openai.OpenAI) -> None:
    for prompt in ("hi", ["a", "b"], [1, 2], [[1], [2]]):
        answer = client.completions.create(model="org/fake", prompt=prompt)
        assert all(choice.text == "héllo 🙂" for choice in answer.choices)
    stream = client.completions.create(model="org/fake", prompt="slow", stream=True, stop="three")
    assert "".join(chunk.choices[0].text for chunk in stream) == "one two "
    assert [model.id for model in client.models.list()] == ["org/fake"]
    assert client.models.retrieve("org/fake").owned_by == "tracehaul"


def test_openai_client_knows_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**(ask("hi") | {"model": "other"}))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(**ask("hi " * 100_000))
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    assert "This model's maximum context length is " in long.value.message
    assert client.chat.completions.create(**ask("hi"), max_tokens=100_000).usage, "what the window has is enough"
    with pytest.raises(openai.InternalServerError) as busy:
        client.chat.completions.create(**ask("overload"), stream=True)
    assert busy.value.status_code == 503
    assert busy.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.BadRequestError) as odd:
        client.chat.completions.create(**ask("hi"), extra_body={"chat_template": "x"})
    assert (odd.value.code, odd.value.param) == ("unsupported_parameter", "chat_template")


def test_openai_client_leaves(cluster: Cluster, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(**ask("forever"), stream=True)
    next(iter(stream))
    assert cluster.dispatcher.running == 1
    aborted = len(cluster.dispatcher.aborted)
    stream.close()
    wait_until(lambda: cluster.dispatcher.running == 0, SOON_S)
    assert len(cluster.dispatcher.aborted) == aborted + 1


def test_openai_client_parses_structured_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(**ask("event"), response_format=Event)
    assert answer.choices[0].message.parsed == Event(name="Science Fair", people=["Alice", "Bob"])
    with client.chat.completions.stream(**ask("event"), response_format=Event) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Event(name="Science Fair", people=["Alice", "Bob"])


def test_openai_client_on_schemas_that_are_none(cluster: Cluster, client: openai.OpenAI) -> None:
    asked = len(cluster.dispatcher.requests)
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "what"}, "strict": True}}
    with pytest.raises(openai.BadRequestError, match="what"):
        client.chat.completions.create(**ask("hi"), response_format=wrong)
    with pytest.raises(openai.BadRequestError, match="unclosed"):
        client.chat.completions.create(**ask("hi"), extra_body={"structured_outputs": {"regex": "(a"}})
    assert len(cluster.dispatcher.requests) == asked


def test_openai_client_on_tools(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ask("weather"), tools=[WEATHER])
    told = answer.choices[0]
    assert (told.finish_reason, told.message.content) == ("tool_calls", "One moment.")
    assert told.message.tool_calls is not None
    assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in told.message.tool_calls] == [
        ("function", "weather", {"city": "Paris"})
    ] * 2
    said: Any = told.message.model_dump(exclude_none=True)
    results: list[Any] = [{"role": "tool", "tool_call_id": c.id, "content": "sun"} for c in told.message.tool_calls]
    messages: list[Any] = [{"role": "user", "content": "hi"}, said, *results]
    again = client.chat.completions.create(model="org/fake", messages=messages, tools=[WEATHER])
    assert again.choices[0].message.content == "héllo 🙂"


def test_openai_client_on_streamed_tools(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**ask("weather"), tools=[WEATHER]) as stream:
        told = stream.get_final_completion().choices[0]
    assert (told.finish_reason, told.message.content) == ("tool_calls", "One moment.")
    assert told.message.tool_calls is not None
    assert [json.loads(call.function.arguments) for call in told.message.tool_calls] == [{"city": "Paris"}] * 2
    assert len({call.id for call in told.message.tool_calls}) == 2


@contextmanager
def sent(cluster: Cluster, data: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", cluster.port), timeout=20) as connection:
        connection.sendall(data)
        yield connection


def request(body: bytes, path: str = "/v1/chat/completions") -> bytes:
    return (f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n").encode() + body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("asked", ["forever", "never"])
def test_a_broken_connection_aborts_at_once(cluster: Cluster, asked: str, reset: bool, stream: bool) -> None:
    aborted = len(cluster.dispatcher.aborted)
    with sent(cluster, request(json.dumps(ask(asked, stream=stream)).encode())) as connection:
        wait_until(lambda: cluster.dispatcher.running == 1, SOON_S)
        if stream and asked == "forever":
            assert b"HTTP/1.1 200" in connection.recv(65536)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    wait_until(lambda: cluster.dispatcher.running == 0, SOON_S)
    assert len(cluster.dispatcher.aborted) == aborted + 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00" * 100,
        b"[" * 200_000,
        b'{"model":"org/fake","metadata":' + b'{"a":' * 100_000,
        b'{"model":"org/fake","messages":[{"role":"user","content":"\xff\xfe"}]}',
        b'{"model":"org/fake","messages":[{"role":"user","content":"\\ud800"}]',
        b'{"model":"org/fake","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
        b'{"model":"org/fake","messages":[{"role":"user","content":"x"}],"max_tokens":1' + b"0" * 4000 + b"}",
        b'{"model":"org/fake","messages":[{"role":"user","content":"x"}],"seed":1e308}',
    ],
    ids=range(9),
)
def test_hostile_bodies(cluster: Cluster, body: bytes) -> None:
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_half_a_surrogate_pair_does_not_end_a_conversation(cluster: Cluster) -> None:
    body = b'{"model":"org/fake","messages":[{"role":"user","content":"\\ud800"}]}'
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", content=body)
    assert (answer.status_code, "x-tracehaul-warning" in answer.headers) == (200, True)


def test_surrogate_pairs_and_nul_are_text(cluster: Cluster) -> None:
    body = (
        b'{"model":"org/fake","messages":[{"role":"user","content":"\\ud83d\\ude42 \\u0000"}],"stop":"\\ud83d\\ude42"}'
    )
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", content=body)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "héllo "


def test_a_body_of_ten_megabytes(cluster: Cluster) -> None:
    body = json.dumps(ask("x" * 10 * 2**20)).encode()
    with httpx.Client() as http:
        answer = http.post(f"{cluster.url}/v1/chat/completions", content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        # The connection is still good, or is made anew.
        assert http.get(f"{cluster.url}/health").status_code == 200


def test_a_long_prompt_does_not_stop_the_others(cluster: Cluster) -> None:
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(httpx.post, f"{cluster.url}/v1/chat/completions", json=ask("ab" * 2**19), timeout=20)
        answers = 0
        while not long.done():
            answers += httpx.get(f"{cluster.url}/health", timeout=20).status_code == 200
        assert long.result().json()["error"]["code"] == "context_length_exceeded"
        assert answers >= 1


def test_a_client_that_reads_slowly_misses_nothing(cluster: Cluster) -> None:
    told = b""
    body = json.dumps(ask("much", stream=True)).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", cluster.port))
        connection.sendall(request(body))
        while not told.endswith(b"\r\n0\r\n\r\n"):
            time.sleep(0.0005)
            told += connection.recv(1 << 16)
    parts = re.findall(rb'"content":"([0-9 ]+)"', told)
    assert b"".join(parts).split() == [b"%d" % at for at in range(MUCH)]


def test_closing_the_server_tells_those_in_mid_stream() -> None:
    with Cluster(ApiConfig()) as running, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            httpx.post, f"{running.url}/v1/chat/completions", json=ask("forever", stream=True), timeout=20
        )
        wait_until(lambda: running.dispatcher.running == 1, SOON_S)
        running.stop()
        events = answer.result().text.split("\n\n")
    assert "the server is stopping" in events[-3]
    assert events[-2] == "data: [DONE]"


def test_a_port_in_use_is_said() -> None:
    async def main() -> None:
        app = create_app(FakeDispatcher(script), {"org/fake": FakeText()}, lambda: b"", ApiConfig(), ThreadOffload("t"))
        first = await serve(app, "127.0.0.1", 0)
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{first.port}: "):
            await serve(app, "127.0.0.1", first.port)
        await first.close()
        again = await serve(app, "127.0.0.1", first.port)
        await again.close()

    asyncio.run(main())
