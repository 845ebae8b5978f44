"""Responses: items in, items out, whole and as events."""

from typing import Any

import pytest

from router.calls.call import Message, ToolCall
from router.calls.errors import CallFailed
from router.calls.events import Begun, Ended, Opening, Piece, Said, SaidCall, Usage
from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dialects.responses.answers import Response
from router.dialects.responses.items import messages_of, sealed, unsealed
from router.dialects.responses.requests import Item, Part
from router.dialects.responses.teller import ResponseTeller, Shape
from router.dialects.responses.tools import chat_choice, chat_tools, honoured
from router.dispatch.steps import Output, StepRequest
from router.traces.hits import Hits
from tests.unit.router.dialects.asking import post, told
from tracehaul.wire.errors import PeerLost
from tracehaul.wire.hashing import unpack_tokens

PATH = "/v1/responses"
ASK: dict[str, Any] = {"model": "org/fake", "input": "hi"}
CLOCK = {"type": "function", "name": "clock", "description": "tells", "parameters": {"type": "object"}}
CALLS = 'So.<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
CALLS += '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def prompt_of(dispatcher: FakeDispatcher, at: int = -1) -> list[int]:
    return unpack_tokens(dispatcher.requests[at].prompt)


def test_a_whole_response() -> None:
    dispatcher = FakeDispatcher(say("héllo"))
    fields = {"instructions": "be brief", "max_output_tokens": 9, "temperature": 0.5, "metadata": {"a": "b"}}
    (answer,) = post(dispatcher, PATH, ASK | fields)
    body = answer.json()
    assert answer.status_code == 200
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    prompt = FakeText().encode(text)
    assert prompt_of(dispatcher) == prompt
    sampling = dispatcher.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature) == (9, 0.5)
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", "org/fake")
    assert body["id"].startswith("resp_")
    (item,) = body["output"]
    assert item == {
        "id": item["id"],
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "héllo", "annotations": [], "logprobs": []}],
    }
    assert item["id"].startswith("msg_")
    usage = body["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (len(prompt), 7)
    assert usage["total_tokens"] == len(prompt) + 7
    assert usage["input_tokens_details"]["cached_tokens"] == len(prompt) // 2
    assert usage["tracehaul"]["hits"]["losses"] == {"evicted": 1}
    assert (body["instructions"], body["metadata"], body["store"]) == ("be brief", {"a": "b"}, True)
    assert (body["error"], body["incomplete_details"], body["tools"]) == (None, None, [])
    assert answer.headers["x-trace-id"] == dispatcher.requests[0].trace


def test_a_cut_response_is_incomplete() -> None:
    (answer,) = post(FakeDispatcher(say("héllo", reason="length")), PATH, ASK)
    body = answer.json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"


def test_items_are_messages() -> None:
    items = [
        Item(role="developer", content="rules"),
        Item("message", role="user", content=[Part("input_text", "a"), Part("input_text", "b")]),
        Item("reasoning", summary=[Part("summary_text", "short")], content=[Part("reasoning_text", "long")]),
        Item("message", role="assistant", content=[Part("output_text", "look"), Part("refusal", refusal="!")]),
        Item("function_call", call_id="c1", name="one", arguments="{}"),
        Item("custom_tool_call", call_id="c2", name="two", input="ls"),
        Item("function_call_output", call_id="c1", output="1"),
        Item("custom_tool_call_output", call_id="c2", output=[Part("input_text", "2")]),
        Item("reasoning", summary=[], encrypted_content=sealed("hidden ünder")),
        Item("function_call", call_id="c3", name="one", arguments="{}"),
        Item("reasoning", summary=[Part("summary_text", "short")], encrypted_content="gAAAAsomebody"),
        Item("message", role="assistant", content="done"),
        Item("message", role="assistant", content="and more"),
    ]
    assert messages_of(items) == (
        Message("system", "rules"),
        Message("user", "ab"),
        Message(
            "assistant",
            "look!",
            reasoning="long",
            tool_calls=(ToolCall("c1", "one", "{}"), ToolCall("c2", "two", '{"input": "ls"}')),
        ),
        Message("tool", "1", tool_call_id="c1"),
        Message("tool", "2", tool_call_id="c2"),
        Message("assistant", reasoning="hidden ünder", tool_calls=(ToolCall("c3", "one", "{}"),)),
        Message("assistant", "done", reasoning="short"),
        Message("assistant", "and more"),
    )


def test_tools_and_answers_may_have_said_nothing() -> None:
    items = [
        Item("function_call_output", call_id="c1"),
        Item("custom_tool_call_output", call_id="c2", output=[]),
        Item("message", role="assistant"),
    ]
    assert messages_of(items) == (
        Message("tool", "", tool_call_id="c1"),
        Message("tool", "", tool_call_id="c2"),
        Message("assistant", ""),
    )


@pytest.mark.parametrize("foreign", [None, "", "th1", "th1.***", "th1._w==", "gAAAAA", "th1.AA=A"])
def test_what_others_sealed_is_not_read(foreign: str | None) -> None:
    assert unsealed(foreign) is None
    assert unsealed(sealed("th1.~~é\n")) == "th1.~~é\n"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 5}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "n"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
        ({"instructions": 1}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "9"}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"truncation": "some"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"background": True, "store": False}, "store"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": "all"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools", "tools": 1}}, "tool_choice.tools"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"store": "yes"}, "store"),
    ],
)
def test_what_is_wrong_is_refused_by_name_and_before_any_work(fields: dict[str, Any], param: str) -> None:
    dispatcher = FakeDispatcher(say("x"))
    (answer,) = post(dispatcher, PATH, ASK | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not dispatcher.requests


def test_unknown_fields_are_ignored() -> None:
    fields = {"client_metadata": {"x": 1}, "max_tool_calls": 4, "stream_options": None, "n": 3, "verbosity": []}
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi", "x": 1}], "phase": "a"}
    dispatcher = FakeDispatcher(say("x"))
    (answer,) = post(dispatcher, PATH, ASK | fields | {"input": [item]})
    assert answer.status_code == 200
    assert len(dispatcher.requests) == 1


def test_tools_are_told_in_the_words_of_chat() -> None:
    hosted = {"type": "web_search"}
    grammar = {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'}
    custom = {"type": "custom", "name": "patch", "format": grammar}
    assert honoured([CLOCK, hosted, custom]) == [CLOCK, custom]
    function = {key: value for key, value in CLOCK.items() if key != "type"}
    form = {"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: "x"'}}
    assert chat_tools([CLOCK, custom]) == [
        {"type": "function", "function": function},
        {"type": "custom", "custom": {"name": "patch", "format": form}},
    ]
    assert chat_choice("required") == "required"
    assert chat_choice({"type": "function", "name": "clock"}) == {"type": "function", "function": {"name": "clock"}}
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]}
    named = [{"type": "function", "function": {"name": "clock"}}]
    assert chat_choice(allowed) == {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": named}}
    with pytest.raises(CallFailed):
        chat_choice({"type": "file_search"})


def test_calls_of_functions() -> None:
    dispatcher = FakeDispatcher(say(CALLS))
    (answer,) = post(dispatcher, PATH, ASK | {"tools": [CLOCK, {"type": "web_search"}], "tool_choice": "auto"})
    body = answer.json()
    assert body["tools"] == [CLOCK]
    text, first, second = body["output"]
    assert text["content"][0]["text"] == "So."
    assert (first["type"], first["name"], first["arguments"]) == ("function_call", "clock", '{"zone": "UTC"}')
    assert (second["arguments"], second["status"]) == ("{}", "completed")
    assert first["call_id"] != second["call_id"]
    assert len({text["id"], first["id"], second["id"]}) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("answer", "stops", "statuses"),
    [
        (CALLS, None, ["completed"] * 3),
        ('<tool_call>{"name": "clock", "arguments": {"zone": "東京 日本"}}</tool_call>', ["日"], ["incomplete"]),
        ('<tool_call>{"name": "clock", "arguments": {"zone": "a', None, ["incomplete"]),
        ('<tool_call>{"name": "patch", "arguments": {"input": "a', None, ["incomplete"]),
        ('<tool_call>{"name": "patch", "arguments": {"input": "a"}}</tool_call>', None, ["completed"]),
        ('<tool_call>{"name": "clock", "arguments": ' + '{"a":' * 3000 + "1" + "}" * 3001, None, ["completed"]),
    ],
    ids=["whole", "a stop string", "the model's end", "custom", "custom, whole", "deep"],
)
def test_a_call_that_was_cut_is_incomplete(
    answer: str, stops: list[str] | None, statuses: list[str], stream: bool
) -> None:
    tools = [CLOCK, {"type": "custom", "name": "patch"}]
    fields: dict[str, Any] = {"tools": tools, "stream": stream} | ({"stop": stops} if stops else {})
    (answered,) = post(FakeDispatcher(say(answer), context_max=1 << 16), PATH, ASK | fields)
    events = told(answered.text) if stream else []
    response = events[-1]["response"] if stream else answered.json()
    assert [item["status"] for item in response["output"]] == statuses
    done = [event["item"]["status"] for event in events if event["type"] == "response.output_item.done"]
    assert done == (statuses if stream else [])


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"tools": [CLOCK], "tool_choice": "required"}, "grammar"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "name": "clock"}}, "grammar"),
        ({"text": {"format": {"type": "json_object"}}}, "json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}}, "json_schema"),
        ({"text": {"format": {"type": "text"}}}, None),
    ],
)
def test_what_an_answer_is_held_to(fields: dict[str, Any], kind: str | None) -> None:
    dispatcher = FakeDispatcher(say('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'))
    (answer,) = post(dispatcher, PATH, ASK | fields)
    assert answer.status_code == 200
    constraint = dispatcher.requests[0].sampling.constraint
    assert (constraint and constraint.kind) == kind


def test_a_streamed_text() -> None:
    (answer,) = post(FakeDispatcher(say("abc")), PATH, ASK | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = told(answer.text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 3,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    created, final = events[0]["response"], events[-1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert (final["status"], final["id"]) == ("completed", created["id"])
    assert [event["delta"] for event in events[4:7]] == ["a", "b", "c"]
    assert events[7]["text"] == "abc"
    assert events[8]["part"]["text"] == "abc"
    assert final["output"] == [events[9]["item"]]
    assert {event["item_id"] for event in events[3:9]} == {final["output"][0]["id"]}
    assert final["usage"]["output_tokens"] == 4


def test_streamed_calls() -> None:
    (answer,) = post(FakeDispatcher(say(CALLS)), PATH, ASK | {"stream": True, "tools": [CLOCK]})
    events = told(answer.text)
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [(event["output_index"], event["item"]["type"]) for event in added] == [
        (0, "message"),
        (1, "function_call"),
        (2, "function_call"),
    ]
    assert added[1]["item"]["arguments"] == ""
    deltas = [event for event in events if event["type"] == "response.function_call_arguments.delta"]
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert "".join(event["delta"] for event in deltas if event["output_index"] == 1) == '{"zone": "UTC"}'
    assert [(event["arguments"], event["name"]) for event in done] == [('{"zone": "UTC"}', "clock"), ("{}", "clock")]
    whole = events[-1]["response"]["output"]
    assert [item["id"] for item in whole[1:]] == [event["item_id"] for event in done]
    assert all(item["call_id"] == event["item"]["call_id"] for item, event in zip(whole[1:], added[1:], strict=True))


def test_calls_of_custom_tools_have_a_text() -> None:
    begun = Response(id="resp_x", created_at=0, model="m", status="in_progress")
    teller = ResponseTeller(begun, Shape(custom=frozenset({"patch"})), (), ())
    usage = Usage(1, 0, 3, 0, 0, 0, 0, 0.0, 0, "", Hits())
    pieces = [Said(calls=(SaidCall(0, "c1", "patch", ""),)), *(Said(calls=(SaidCall(0, None, None, t),)) for t in "ab")]
    events = [Begun(0, Opening()), *(Piece(0, said, [1], ()) for said in pieces), Ended(0, "stop", True)]
    told_events = told((teller.events(events) + teller.end(usage)).decode())
    item = {"id": "ctc_x000", "type": "custom_tool_call", "call_id": "c1", "name": "patch", "status": "completed"}
    assert told_events[-1]["response"]["output"] == [item | {"input": "ab"}]
    assert [
        (event["type"].removeprefix("response."), event.get("delta", event.get("input"))) for event in told_events[3:6]
    ] == [
        ("custom_tool_call_input.delta", "a"),
        ("custom_tool_call_input.delta", "b"),
        ("custom_tool_call_input.done", "ab"),
    ]
    assert [event["sequence_number"] for event in told_events] == list(range(len(told_events)))


@pytest.mark.parametrize("choice", ["auto", {"type": "custom", "name": "patch"}])
def test_custom_tools_are_called_and_answered(choice: Any) -> None:
    said = '<tool_call>\n{"name": "patch", "arguments": {"input": "a\\nb"}}\n</tool_call>'
    dispatcher = FakeDispatcher(say(said))
    ask = ASK | {"tools": [{"type": "custom", "name": "patch"}], "tool_choice": choice}
    whole, stream = post(dispatcher, PATH, ask, ask | {"stream": True})
    (call,) = whole.json()["output"]
    assert (call["type"], call["name"], call["input"]) == ("custom_tool_call", "patch", "a\nb")
    events = [event for event in told(stream.text) if "custom" in event["type"]]
    assert "".join(event.get("delta", "") for event in events) == events[-1]["input"] == "a\nb"
    assert (dispatcher.requests[0].sampling.constraint is not None) == (choice != "auto")


def test_a_stream_that_breaks_says_that_the_response_failed() -> None:
    def script(request: StepRequest) -> Script:
        return [Output([97]), PeerLost("gone")]

    (answer,) = post(FakeDispatcher(script), PATH, ASK | {"stream": True})
    events = told(answer.text)
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    assert (response["status"], response["error"]) == ("failed", {"code": "server_error", "message": "gone"})
    assert events[-1]["sequence_number"] == len(events) - 1


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [({"model": "other"}, 404, "model_not_found"), ({"input": "x" * 5000}, 400, "context_length_exceeded")],
)
def test_what_fails_before_its_first_event_has_a_status(fields: dict[str, Any], status: int, code: str) -> None:
    (answer,) = post(FakeDispatcher(say("x")), PATH, ASK | fields | {"stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_conversation_goes_on_from_chat_in_the_same_trace() -> None:
    dispatcher = FakeDispatcher(say("x"))
    items = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "?"}]
    chat = {"model": "org/fake", "messages": items}
    post(dispatcher, PATH, ASK | {"input": items})
    first = prompt_of(dispatcher)
    post(dispatcher, "/v1/chat/completions", chat)
    assert prompt_of(dispatcher) == first
