"""Anthropic's messages: blocks in, blocks out, whole and as events."""

from typing import Any

import httpx
import pytest

from router.calls.call import Message, ToolCall
from router.calls.errors import CallFailed
from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dialects.messages.conversation import conversation_of
from router.dialects.messages.requests import Asked, Block
from router.dialects.messages.requests import Message as Sent
from router.dispatch.steps import StepRequest
from router.http.config import ApiConfig
from router.http.keys import Keyring
from tests.unit.router.dialects.asking import key_of, post, served, told
from tracehaul.wire.errors import PeerLost
from tracehaul.wire.hashing import unpack_tokens

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
ASK: dict[str, Any] = {"model": "org/fake", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
CLOCK = {"name": "clock", "description": "tells", "input_schema": {"type": "object"}}
CALLS = 'So.<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
CALLS += '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def test_a_whole_message() -> None:
    dispatcher = FakeDispatcher(say("héllo"))
    fields = {"system": "be brief", "temperature": 0.5, "top_k": 7, "top_p": 0.9}
    (answer,) = post(dispatcher, PATH, ASK | fields, headers={"anthropic-version": "2023-06-01"})
    body = answer.json()
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    prompt = FakeText().encode(text)
    assert unpack_tokens(dispatcher.requests[0].prompt) == prompt
    sampling = dispatcher.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (100, 0.5, 7, 0.9)
    assert body["id"].startswith("msg_")
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "org/fake")
    assert body["content"] == [{"type": "text", "text": "héllo", "citations": None}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    usage = body["usage"]
    cached = len(prompt) // 2
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (len(prompt) - cached, cached)
    assert (usage["output_tokens"], usage["cache_creation_input_tokens"]) == (7, 0)
    assert usage["tracehaul"]["hits"]["losses"] == {"evicted": 1}


def test_blocks_are_messages() -> None:
    text = Block("text", text="a")
    answer = [
        Block("thinking", thinking="hm", signature="any"),
        Block("redacted_thinking", data="x"),
        text,
        Block("tool_use", id="t1", name="one", input={"x": [1, "é"]}),
        Block("tool_use", id="t2", name="two", input={}),
    ]
    results = [
        Block("tool_result", tool_use_id="t1", content="1"),
        Block("tool_result", tool_use_id="t2", content=[Block("text", text="2"), text], is_error=True),
        text,
        Block("text", text="b"),
    ]
    asked = Asked(
        model="m",
        system=[Block("text", text="rules. "), Block("text", text="more.")],
        messages=[Sent("user", "hi"), Sent("assistant", answer), Sent("user", results), Sent("system", "now")],
    )
    conversation = conversation_of(asked)
    assert conversation.messages == (
        Message("system", "rules. more."),
        Message("user", "hi"),
        Message(
            "assistant",
            "a",
            reasoning="hm",
            tool_calls=(ToolCall("t1", "one", '{"x":[1,"é"]}'), ToolCall("t2", "two", "{}")),
        ),
        Message("tool", "1", tool_call_id="t1"),
        Message("tool", "2a", tool_call_id="t2"),
        Message("user", "ab"),
        Message("system", "now"),
    )
    assert (conversation.add_generation_prompt, conversation.continue_final_message) == (True, False)


def test_an_empty_result_of_a_tool_is_empty() -> None:
    asked = Asked(model="m", messages=[Sent("user", [Block("tool_result", tool_use_id="t")])])
    assert conversation_of(asked).messages == (Message("tool", "", tool_call_id="t"),)
    with pytest.raises(CallFailed):
        conversation_of(Asked(model="m", messages=[]))


def test_a_last_message_of_the_assistants_goes_on() -> None:
    dispatcher = FakeDispatcher(say("x"))
    messages = [*ASK["messages"], {"role": "assistant", "content": "The answer is ("}]
    (answer,) = post(dispatcher, PATH, ASK | {"messages": messages})
    assert answer.status_code == 200
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nThe answer is ("
    assert unpack_tokens(dispatcher.requests[0].prompt) == FakeText().encode(text)


def in_messages(*blocks: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (in_messages({"text": "x"}), "messages[0].content[0].type"),
        (in_messages({"type": "text"}), "messages[0].content[0].text"),
        (in_messages({"type": "image", "source": {}}), "messages[0].content[0]"),
        (in_messages({"type": "tool_result"}), "messages[0].content[0].tool_use_id"),
        (in_messages({"type": "tool_use", "id": "x", "name": "n"}, role="assistant"), "messages[0].content[0].input"),
        (in_messages({"type": "tool_use", "name": "n", "input": {}}, role="assistant"), "messages[0].content[0].id"),
        (in_messages({"type": "tool_use", "id": "x", "input": []}, role="assistant"), "messages[0].content[0].input"),
        (in_messages({"type": "thinking"}, role="assistant"), "messages[0].content[0].thinking"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"system": 1}, "system"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": "on"}, "thinking"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ],
)
def test_what_is_wrong_is_refused_by_name_and_before_any_work(fields: dict[str, Any], param: str) -> None:
    dispatcher = FakeDispatcher(say("x"))
    (answer,) = post(dispatcher, PATH, ASK | fields, headers={"x-request-id": "mine"})
    body = answer.json()
    assert (answer.status_code, body["type"], body["request_id"]) == (400, "error", "mine")
    assert (body["error"]["type"], body["error"]["param"]) == ("invalid_request_error", param)
    assert param in body["error"]["message"]
    assert not dispatcher.requests


def test_what_is_missing_is_named() -> None:
    (answer,) = post(FakeDispatcher(say("x")), PATH, {"model": "org/fake", "messages": ASK["messages"]})
    assert answer.status_code == 400
    assert "max_tokens" in answer.json()["error"]["message"]


def test_unknown_fields_and_hints_are_taken() -> None:
    mark = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    fields = {
        "system": [{"type": "text", "text": "rules"} | mark],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "citations": None} | mark]}],
        "tools": [CLOCK | mark],
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "context_management": {"edits": []},
    }
    marked, plain = FakeDispatcher(say("x")), FakeDispatcher(say("x"))
    (answer,) = post(marked, PATH, ASK | fields | mark)
    assert answer.status_code == 200
    post(plain, PATH, ASK | {"system": "rules", "tools": [CLOCK]})
    assert marked.requests[0].prompt == plain.requests[0].prompt
    assert (marked.requests[0].keep_s, plain.requests[0].keep_s) == (3600.0, 0.0)


MARK: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}
TEXT_BLOCK: dict[str, Any] = {"type": "text", "text": "hi"}


@pytest.mark.parametrize(
    "fields",
    [
        MARK,
        {"system": [TEXT_BLOCK, TEXT_BLOCK | MARK]},
        {"tools": [CLOCK | MARK]},
        {"messages": [{"role": "user", "content": [TEXT_BLOCK | MARK, TEXT_BLOCK]}]},
        {
            "messages": [
                {"role": "user", "content": [TEXT_BLOCK | {"cache_control": {"type": "ephemeral", "ttl": "5m"}}]}
            ]
        },
    ],
)
def test_a_mark_anywhere_asks_to_keep_the_context(fields: dict[str, Any]) -> None:
    dispatcher = FakeDispatcher(say("x"))
    post(dispatcher, PATH, ASK | fields)
    assert dispatcher.requests[0].keep_s == 300.0


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        ({"model": "other"}, 404, "not_found_error"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "lost"}]}, 503, "overloaded_error"),
        ({"messages": [{"role": "user", "content": "bug"}]}, 500, "api_error"),
        ({"messages": [{"role": "user", "content": "x" * 20000}]}, 413, "request_too_large"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_anthropics_form(failure: dict[str, Any], status: int, kind: str, stream: bool) -> None:
    def script(request: StepRequest) -> Script:
        asked = FakeText().stream().push(unpack_tokens(request.prompt))
        return [PeerLost("gone") if "lost" in asked else RuntimeError("oh")]

    config = ApiConfig(body_bytes_max=10000)
    (answer,) = post(FakeDispatcher(script), PATH, ASK | failure | {"stream": stream}, config=config)
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["request_id"] == answer.headers["x-request-id"]


def test_keys_are_asked_for_in_anthropics_form() -> None:
    sent, key = key_of("a", 1, models=("org/fake",), requests_per_minute=1)
    counts, other = key_of("a", 2, models=("org/fake",))

    async def use(client: httpx.AsyncClient) -> None:
        for headers, fields, status, kind in (
            ({}, {}, 401, "authentication_error"),
            ({"x-api-key": sent}, {"model": "other"}, 403, "permission_error"),
            ({"x-api-key": sent}, {}, 429, "rate_limit_error"),
        ):
            refused = await client.post(PATH, json=ASK | fields, headers=headers)
            assert (refused.status_code, refused.json()["error"]["type"]) == (status, kind)
        counted = await client.post(COUNT, json=ASK | {"model": "other"}, headers={"x-api-key": counts})
        assert (counted.status_code, counted.json()["error"]["type"]) == (403, "permission_error")
        assert (await client.post(COUNT, json=ASK, headers={"x-api-key": counts})).status_code == 200

    served(FakeDispatcher(say("x")), use, keyring=Keyring([key, other]))


def test_calls_of_tools() -> None:
    (answer,) = post(FakeDispatcher(say(CALLS)), PATH, ASK | {"tools": [CLOCK]})
    text, first, second = answer.json()["content"]
    assert text["text"] == "So."
    assert (first["type"], first["name"], first["input"]) == ("tool_use", "clock", {"zone": "UTC"})
    assert second["input"] == {}
    assert first["id"] != second["id"]
    assert answer.json()["stop_reason"] == "tool_use"


def test_deep_arguments_are_told() -> None:
    deep = '{"a":' * 3000 + "1" + "}" * 3000
    dispatcher = FakeDispatcher(say(f'<tool_call>{{"name": "clock", "arguments": {deep}}}</tool_call>'), 1 << 16)
    (answer,) = post(dispatcher, PATH, ASK | {"tools": [CLOCK]})
    assert f'"input":{deep}' in answer.text


def test_one_call_at_a_time() -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    (answer,) = post(FakeDispatcher(say(CALLS)), PATH, ASK | {"tools": [CLOCK], "tool_choice": choice})
    assert [block["type"] for block in answer.json()["content"]] == ["text", "tool_use"]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"tools": [CLOCK], "tool_choice": {"type": "any"}}, "grammar"),
        ({"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "clock"}}, "grammar"),
        ({"tools": [CLOCK], "tool_choice": {"type": "auto"}}, None),
        ({"tools": [CLOCK], "tool_choice": {"type": "none"}}, None),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}, "json_schema"),
    ],
)
def test_what_an_answer_is_held_to(fields: dict[str, Any], kind: str | None) -> None:
    dispatcher = FakeDispatcher(say('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'))
    (answer,) = post(dispatcher, PATH, ASK | fields)
    assert answer.status_code == 200
    constraint = dispatcher.requests[0].sampling.constraint
    assert (constraint and constraint.kind) == kind
    none = fields.get("tool_choice") == {"type": "none"}
    assert (answer.json()["stop_reason"] == "tool_use") == ("tools" in fields and not none)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "script", "ends"),
    [
        ({"stop_sequences": ["xx", "lo w"]}, "hello world", ("stop_sequence", "lo w", "hel")),
        ({"stop_sequences": ["xx"]}, "hello", ("end_turn", None, "hello")),
        ({}, None, ("max_tokens", None, "hello")),
    ],
)
def test_why_an_answer_ends(
    fields: dict[str, Any], script: str | None, ends: tuple[str, str | None, str], stream: bool
) -> None:
    dispatcher = FakeDispatcher(say(script) if script else say("hello", reason="length"))
    (answer,) = post(dispatcher, PATH, ASK | fields | {"stream": stream})
    if stream:
        events = told(answer.text)
        ending = events[-2]["delta"]
        text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    else:
        ending, text = answer.json(), answer.json()["content"][0]["text"]
    assert (ending["stop_reason"], ending["stop_sequence"], text) == ends


def test_a_conversation_goes_on_from_chat_in_the_same_trace() -> None:
    dispatcher = FakeDispatcher(say("x"))
    messages = [*ASK["messages"], {"role": "assistant", "content": "x"}, {"role": "user", "content": "?"}]
    post(dispatcher, PATH, ASK | {"messages": messages})
    chat = {"model": "org/fake", "messages": messages}
    post(dispatcher, "/v1/chat/completions", chat)
    one, two = dispatcher.requests
    assert one.prompt == two.prompt


def test_tokens_are_counted() -> None:
    dispatcher = FakeDispatcher(say("x"))
    asked = {key: value for key, value in ASK.items() if key != "max_tokens"} | {"system": "s", "tools": [CLOCK]}

    async def use(client: httpx.AsyncClient) -> None:
        counted = (await client.post(COUNT, json=asked)).json()
        assert not dispatcher.requests
        usage = (await client.post(PATH, json=asked | {"max_tokens": 9})).json()["usage"]
        assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
        long = await client.post(COUNT, json=asked | {"messages": [{"role": "user", "content": "x" * 9000}]})
        assert long.json()["input_tokens"] > 9000
        for fields, status, kind in (
            ({"messages": []}, 400, "invalid_request_error"),
            ({"messages": 1}, 400, "invalid_request_error"),
            ({"model": "other"}, 404, "not_found_error"),
        ):
            wrong = await client.post(COUNT, json=asked | fields)
            assert (wrong.status_code, wrong.json()["type"], wrong.json()["error"]["type"]) == (status, "error", kind)

    served(dispatcher, use)
