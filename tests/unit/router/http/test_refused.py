"""A call that is over leaves nothing behind: not even until the next collection of cycles."""

import asyncio
import gc
from typing import Any

import httpx
import pytest

from router.calls.call import Call
from router.calls.fakes import FakeDispatcher, FakeText, say
from router.dispatch.steps import Output
from router.http.app import create_app
from router.http.config import ApiConfig
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.errors import PeerLost

CHAT: dict[str, Any] = {"model": "org/fake", "messages": [{"role": "user", "content": "hi"}]}
LONG = "x" * 200_000


class CountedText(FakeText):
    """Counts what it has to tokenize."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        assert len(text) < len(LONG), "hopeless texts are not tokenized"
        return super().encode(text, special)


class Failing(FakeDispatcher):
    """Fails by itself: an error that a script holds would lead back to it."""

    async def run(self, request: Any, tell: Any = None) -> Any:
        if "x" in FakeText().stream().push(request.prompt):
            yield Output([104])
        raise PeerLost("gone")


def alive() -> int:
    """Calls in this process."""
    return sum(type(item) is Call for item in gc.get_objects())


SAYS = FakeDispatcher(say("x"))


@pytest.mark.parametrize(
    ("dispatcher", "body", "status"),
    [
        (SAYS, CHAT | {"messages": [{"role": "user", "content": LONG}]}, 400),
        (SAYS, {"model": "org/fake", "messages": [{"role": "user", "content": LONG}], "temperature": 9}, 400),
        (SAYS, CHAT | {"model": "other"}, 404),
        (Failing(say("")), CHAT, 503),
        (Failing(say("")), CHAT | {"messages": [{"role": "user", "content": "x"}], "stream": True}, 200),
        (SAYS, CHAT, 200),
    ],
)
def test_nothing_is_left_of_a_call(dispatcher: FakeDispatcher, body: dict[str, Any], status: int) -> None:
    async def main() -> None:
        app = create_app(dispatcher, {"org/fake": CountedText()}, lambda: b"", ApiConfig(), InlineOffload())
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client, asyncio.timeout(20):
            await client.post("/v1/chat/completions", json=body)
            gc.collect()
            gc.disable()
            before = alive()  # of other tests, whose errors live as long as their parameters
            try:
                for _ in range(3):
                    assert (await client.post("/v1/chat/completions", json=body)).status_code == status
                await asyncio.sleep(0)  # the loop still holds what ran last
                assert alive() <= before
            finally:
                gc.enable()

    asyncio.run(main())


def test_a_prompt_that_cannot_fit_says_how_long_it_is_at_least() -> None:
    async def main() -> httpx.Response:
        app = create_app(
            FakeDispatcher(say("x"), 1000), {"org/fake": CountedText()}, lambda: b"", ApiConfig(), InlineOffload()
        )
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.post("/v1/completions", json={"model": "org/fake", "prompt": LONG})

    answer = asyncio.run(main())
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "prompt", "context_length_exceeded")
    least = FakeText().tokens_min(len(LONG))
    assert error["message"] == (
        f"This model's maximum context length is 1000 tokens. However, you requested at least {least + 1} tokens "
        f"(at least {least} in the prompt, 1 in the completion). Please reduce the length of the prompt or completion."
    )


class UnrenderedText(FakeText):
    """Must not be asked to render."""

    def render(self, *_: Any, **__: Any) -> str:
        raise AssertionError("a hopeless conversation is not rendered")


@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_hopeless_conversation_is_refused_before_it_is_rendered(role: str) -> None:
    async def main() -> httpx.Response:
        text = UnrenderedText()
        app = create_app(FakeDispatcher(say("x"), 1000), {"org/fake": text}, lambda: b"", ApiConfig(), InlineOffload())
        said = {"role": role, "content": LONG} | ({"tool_call_id": "a"} if role == "tool" else {})
        messages = [{"role": "user", "content": "go"}, said]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.post("/v1/chat/completions", json={"model": "org/fake", "messages": messages})

    answer = asyncio.run(main())
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "messages", "context_length_exceeded")
    assert "(at least " in error["message"]


@pytest.mark.parametrize(("prompt", "status"), [("x" * 9000, 400), ("<|im_end|>" * 900, 200)])
def test_a_prompt_that_will_hardly_fit_is_counted_first(prompt: str, status: int) -> None:
    """One that fits in spite of its length is served."""

    async def main() -> None:
        text = FakeText()
        app = create_app(FakeDispatcher(say("x"), 1000), {"org/fake": text}, lambda: b"", ApiConfig(), InlineOffload())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            answer = await client.post("/v1/completions", json={"model": "org/fake", "prompt": prompt})
        assert answer.status_code == status, answer.text
        assert (prompt in text.encoded) == (status == 200)
        if status == 400:
            assert "(at least 1012 in the prompt, " in answer.json()["error"]["message"]

    asyncio.run(main())
