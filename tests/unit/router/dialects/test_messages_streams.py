"""Streams of messages: texts, calls, thoughts, silence, and what breaks."""

from typing import Any

from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dispatch.steps import Output, StepRequest
from router.http.config import ApiConfig
from tests.unit.router.dialects.asking import NotedText, post, told
from tracehaul.wire.errors import PeerLost

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
ASK: dict[str, Any] = {"model": "org/fake", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
CLOCK = {"name": "clock", "description": "tells", "input_schema": {"type": "object"}}
CALLS = 'So.<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
CALLS += '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>\nlet me see\n</think>\n\nyes"


def test_a_streamed_text() -> None:
    (answer,) = post(FakeDispatcher(say("abc")), PATH, ASK | {"stream": True})
    events = told(answer.text)
    kinds = ["message_start", "ping", "content_block_start", *["content_block_delta"] * 3]
    assert [event["type"] for event in events] == [*kinds, "content_block_stop", "message_delta", "message_stop"]
    message = events[0]["message"]
    prompt = len(FakeText().encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"))
    usage = message["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == prompt
    assert usage["cache_read_input_tokens"] == prompt // 2
    assert (message["content"], message["stop_reason"]) == ([], None)
    assert events[2]["content_block"] == {"type": "text", "text": ""}
    assert [event["delta"] for event in events[3:6]] == [{"type": "text_delta", "text": text} for text in "abc"]
    assert events[7]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[7]["usage"]["output_tokens"] == 4
    assert events[7]["usage"]["input_tokens"] == usage["input_tokens"]


def test_streamed_calls() -> None:
    (answer,) = post(FakeDispatcher(say(CALLS)), PATH, ASK | {"stream": True, "tools": [CLOCK]})
    events = told(answer.text)
    starts = [event for event in events if event["type"] == "content_block_start"]
    assert [(event["index"], event["content_block"]["type"]) for event in starts] == [
        (0, "text"),
        (1, "tool_use"),
        (2, "tool_use"),
    ]
    assert all(event["content_block"]["input"] == {} for event in starts[1:])
    parts = [event for event in events if event["type"] == "content_block_delta" and event["index"] == 1]
    assert {event["delta"]["type"] for event in parts} == {"input_json_delta"}
    assert "".join(event["delta"]["partial_json"] for event in parts) == '{"zone": "UTC"}'
    order = [(event["type"], event["index"]) for event in events if "block_st" in event["type"]]
    assert order == [(f"content_block_{what}", index) for index in range(3) for what in ("start", "stop")]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_thinking() -> None:
    asked = ASK | {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    text = NotedText(thinks=True)
    whole, stream = post(FakeDispatcher(say(THOUGHT)), PATH, asked, asked | {"stream": True}, text=text)
    thought, said = whole.json()["content"]
    assert (thought["thinking"], said["text"]) == ("let me see", "yes")
    events = told(stream.text)
    first = [event.get("delta", event.get("content_block")) for event in events if event.get("index") == 0]
    assert first[0] == {"type": "thinking", "thinking": "", "signature": ""}
    assert "".join(delta["thinking"] for delta in first[1:-2]) == "let me see"
    assert first[-2:] == [{"type": "signature_delta", "signature": thought["signature"]}, None]
    assert thought["signature"]
    assert text.variables[0] == {"enable_thinking": True}
    history = {"messages": [*ASK["messages"], {"role": "assistant", "content": [thought, said]}, *ASK["messages"]]}
    post(FakeDispatcher(say("x")), PATH, ASK | history | {"thinking": {"type": "disabled"}}, text=text)
    assert text.rendered[-1][1] == {"role": "assistant", "content": "yes", "reasoning_content": "let me see"}
    assert text.variables[-1] == {"enable_thinking": False}


def test_silence_and_a_broken_stream_have_anthropics_form() -> None:
    def script(request: StepRequest) -> Script:
        return [0.1, Output([97]), PeerLost("gone")]

    config = ApiConfig(keepalive_s=0.07)
    (answer,) = post(FakeDispatcher(script), PATH, ASK | {"stream": True}, config=config)
    events = told(answer.text)
    assert events[0] == {"type": "ping"}
    assert events[1]["type"] == "message_start"
    error = {"type": "overloaded_error", "message": "gone", "param": None, "code": "peer_lost"}
    assert events[-1] == {"type": "error", "error": error, "request_id": answer.headers["x-request-id"]}
