"""Calls with tools, posted to the HTTP app over a model that says what it is told to: what workers are asked, and what
clients are told."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec

from router.calls.fakes import FakeDispatcher, FakeText, say
from router.http.app import create_app
from router.http.config import ApiConfig
from tracehaul.engine.grammar import Grammars, byte_vocabulary
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.steps import CONSTRAINT_CHARACTERS_MAX, Constraint

LLAMA = "<|python_tag|>"
MISTRAL = "[TOOL_CALLS]"
PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}


def function(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or PLACE, **more}}


def custom(name: str, form: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "custom", "custom": {"name": name, "description": "d", **({"format": form} if form else {})}}


WEATHER, CLOCK = function("weather"), function("clock", {"type": "object"})


class ShowingText(FakeText):
    """Renders tools and calls, so that prompts show them."""

    def render(self, messages: Any, tools: Any = None, *arguments: Any, **options: Any) -> str:
        told = [{**message, "content": json.dumps(message, sort_keys=True)} for message in messages]
        return json.dumps(tools) + super().render(told, tools, *arguments, **options)


def ask(
    answer: str, *, template: str | None = None, reason: str = "stop", **fields: Any
) -> tuple[httpx.Response, FakeDispatcher]:
    """Post one call to a model that says ``answer``."""
    dispatcher, text = FakeDispatcher(say(answer, reason=reason), context_max=1 << 21), ShowingText()
    text.chat_template = template
    body = msgspec.json.encode({"model": "org/fake", "messages": [{"role": "user", "content": "hi"}]} | fields)

    async def main() -> httpx.Response:
        app = create_app(dispatcher, {"org/fake": text}, lambda: b"", ApiConfig(), InlineOffload())
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client, asyncio.timeout(60):
            return await client.post("/v1/chat/completions", content=body)

    return asyncio.run(main()), dispatcher


def whole(answer: str, **options: Any) -> dict[str, Any]:
    """The one choice of an answer in one piece."""
    response, _ = ask(answer, **options)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def streamed(answer: str, **options: Any) -> dict[str, Any]:
    """The same of a stream, put together as clients do."""
    response, _ = ask(answer, stream=True, **options)
    assert response.status_code == 200, response.text
    content, reason, calls, called = "", None, dict[int, dict[str, Any]](), dict[str, str]()
    for line in response.text.split("\n\n"):
        if not line or line == "data: [DONE]":
            continue
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        delta = choice["delta"]
        content += delta.get("content") or ""
        reason = choice["finish_reason"] or reason
        for piece in delta.get("tool_calls", []):
            known = calls.setdefault(piece["index"], {})
            _join(known, {key: value for key, value in piece.items() if key != "index"})
        _join(called, delta.get("function_call", {}))
    message = {"content": content, "tool_calls": list(calls.values()), "function_call": called}
    return {"message": message, "finish_reason": reason}


def _join(known: dict[str, Any], piece: dict[str, Any]) -> None:
    for key, value in piece.items():
        if isinstance(value, dict):
            _join(known.setdefault(key, {}), value)
        else:
            known[key] = known.get(key, "") + value


Told = Callable[..., dict[str, Any]]


def calls_of(choice: dict[str, Any]) -> list[tuple[str, str]]:
    calls = choice["message"].get("tool_calls") or []
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def asked(**fields: Any) -> Constraint:
    response, dispatcher = ask("x", **fields)
    assert response.status_code == 200, response.text
    constraint = dispatcher.requests[0].sampling.constraint
    assert constraint is not None
    assert len(constraint.source) <= CONSTRAINT_CHARACTERS_MAX
    return constraint


def refused(**fields: Any) -> dict[str, Any]:
    response, dispatcher = ask("x", **fields)
    assert response.status_code == 400, response.text
    assert not dispatcher.requests
    return response.json()["error"]


def prompt(**fields: Any) -> str:
    response, dispatcher = ask("x", **fields)
    assert response.status_code == 200, response.text
    return FakeText().stream().push(unpack_tokens(dispatcher.requests[0].prompt))


def matching(constraint: Constraint, *texts: str) -> list[bool]:
    """Whether each of ``texts`` is a whole answer."""

    async def main() -> list[bool]:
        grammars = Grammars(lambda: byte_vocabulary(256))
        try:
            return [await one(grammars, text) for text in texts]
        finally:
            grammars.close()

    async def one(grammars: Grammars, text: str) -> bool:
        try:
            guide = await grammars.guide(constraint, list(text.encode()))
        except InvalidRequest as error:
            if "does not match" in str(error):
                return False
            raise
        mask = guide.mask()
        return mask is not None and bool(mask[-1] >> 31)

    return asyncio.run(main())


def hermes(name: str, arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
