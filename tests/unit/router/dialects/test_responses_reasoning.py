"""Thoughts in responses, whole and streamed."""

from typing import Any

import pytest

from router.calls.fakes import FakeDispatcher, say
from router.dialects.responses.items import unsealed
from tests.unit.router.dialects.asking import NotedText, post, told

PATH = "/v1/responses"
ASK: dict[str, Any] = {"model": "org/fake", "input": "hi"}
THOUGHT = "<think>\nlet me see\n</think>\n\nyes"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("summary", [False, True])
def test_reasoning(stream: bool, summary: bool) -> None:
    fields = {"stream": stream, "include": ["reasoning.encrypted_content"]}
    fields["reasoning"] = {"effort": "low", "summary": "auto" if summary else None}
    text = NotedText(thinks=True)
    (answer,) = post(FakeDispatcher(say(THOUGHT)), PATH, ASK | fields, text=text)
    body = told(answer.text)[-1]["response"] if stream else answer.json()
    thought, message = body["output"]
    assert message["content"][0]["text"] == "yes"
    assert unsealed(thought["encrypted_content"]) == "let me see"
    summarised, content = [{"type": "summary_text"}], [{"type": "reasoning_text"}]
    texts = (summarised, []) if summary else ([], content)
    shown = tuple([part | {"text": "let me see"} for part in parts] for parts in texts)
    assert (thought["summary"], thought["content"]) == shown
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert body["reasoning"] == fields["reasoning"]
    assert text.variables == [{"reasoning_effort": "low", "enable_thinking": True}]


@pytest.mark.parametrize("summary", [False, True])
def test_streamed_reasoning(summary: bool) -> None:
    fields = {"stream": True, "reasoning": {"summary": "detailed"} if summary else {}}
    (answer,) = post(FakeDispatcher(say(THOUGHT)), PATH, ASK | fields, text=NotedText(thinks=True))
    events = told(answer.text)
    kinds = list(dict.fromkeys(event["type"].removeprefix("response.") for event in events if "item_id" in event))
    text = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
    thought = ["content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done"]
    summarised = [
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
    ]
    assert kinds == list(dict.fromkeys([*(summarised if summary else thought), *text]))
    first = [event for event in events if event.get("output_index") == 0 and "delta" in event]
    assert "".join(event["delta"] for event in first) == "let me see"
    assert all(event["summary_index" if summary else "content_index"] == 0 for event in first)
