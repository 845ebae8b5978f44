"""Whatever is answered can be sent back, in each form of conversation; what is told as a call is one."""

import json
from collections.abc import Callable
from typing import Any

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from router.calls.fakes import FakeDispatcher, say
from tests.unit.router.dialects.asking import served, told
from tests.unit.router.tool_calls import LLAMA, MISTRAL, ShowingText

PIECES = (
    *'{}[]":,;\\ \n<>/x1', "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>",
    '"name"', '"id"', '"abc123DEF"', '"add"', '"arguments"', '"parameters"', "add", "null", "<think>", "</think>",
    "é🙂", '{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "arguments": {"a": "',
    '{"name": "add", "parameters": {',
)  # fmt: skip
ANSWERS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
TEMPLATES = st.sampled_from(["", f'{MISTRAL} "id"', LLAMA, "<think></think>"])
USER: dict[str, Any] = {"role": "user", "content": "go"}
SCHEMA = {"type": "object"}
Json = dict[str, Any]


def chat(answer: Json) -> Json:
    """The next call in the same form."""
    (choice,) = answer["choices"]
    message = choice["message"]
    calls = message.get("tool_calls") or []
    if choice["finish_reason"] == "tool_calls":
        assert calls
        assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)
    results = [{"role": "tool", "tool_call_id": call["id"], "content": None} for call in calls]
    return {"messages": [USER, message, *results, USER]}


def messages(answer: Json) -> Json:
    calls = [block for block in answer["content"] if block["type"] == "tool_use"]
    assert calls or answer["stop_reason"] != "tool_use"
    results = [{"type": "tool_result", "tool_use_id": call["id"]} for call in calls]
    said = [*results, {"type": "text", "text": "go"}]
    return {"messages": [USER, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": said}]}


def responses(answer: Json) -> Json:
    calls = [item for item in answer["output"] if item["type"] == "function_call"]
    for call in calls:
        assert call["status"] == "incomplete" or isinstance(json.loads(call["arguments"]), dict)
    results = [{"type": "function_call_output", "call_id": call["call_id"], "output": None} for call in calls]
    return {"input": [USER, *answer["output"], *results, USER]}


FORMS: dict[str, tuple[Json, Json, Callable[[Json], Json]]] = {
    "/v1/chat/completions": (
        {"messages": [USER], "tools": [{"type": "function", "function": {"name": "add", "parameters": SCHEMA}}]},
        {"tool_choice": "required"},
        chat,
    ),
    "/v1/messages": (
        {"messages": [USER], "max_tokens": 9999, "tools": [{"name": "add", "input_schema": SCHEMA}]},
        {"tool_choice": {"type": "any"}},
        messages,
    ),
    "/v1/responses": (
        {"input": [USER], "tools": [{"type": "function", "name": "add", "parameters": SCHEMA}]},
        {"tool_choice": "required"},
        responses,
    ),
}


@settings(max_examples=30)
@given(
    path=st.sampled_from(list(FORMS)),
    answer=ANSWERS,
    template=TEMPLATES,
    forced=st.booleans(),
    reason=st.sampled_from(["stop", "length"]),
)
def test_whatever_is_answered_can_be_sent_back(
    path: str, answer: str, template: str, forced: bool, reason: str
) -> None:
    fields, choice, following = FORMS[path]
    body = {"model": "org/fake"} | fields | (choice if forced else {})
    text = ShowingText()
    text.chat_template = template

    async def use(client: httpx.AsyncClient) -> None:
        first = await client.post(path, json=body)
        assert first.status_code == 200, first.text
        again = await client.post(path, json=body | following(first.json()))
        assert again.status_code == 200, again.text
        if path == "/v1/responses":
            streamed = await client.post(path, json=body | {"stream": True})
            last = told(streamed.text)[-1]["response"]
            for more in (following(last), {"input": following(last)["input"][2:], "previous_response_id": last["id"]}):
                assert (await client.post(path, json=body | more)).status_code == 200

    served(FakeDispatcher(say(answer, reason=reason), 1 << 16), use, text=text)
