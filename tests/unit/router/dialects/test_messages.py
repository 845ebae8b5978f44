"""A request's messages, on their way to the chat template."""

from typing import Any

import pytest

from router.calls.call import Message, ToolCall
from router.calls.messages import template_messages
from router.dialects.chat.messages import messages_of
from tests.unit.router.dialects.test_requests import chat, refused


def test_messages_as_templates_read_them() -> None:
    request = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "u"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}},
                    {"id": "2", "function": {"name": "g", "arguments": "not json"}},
                ],
            },
            {"role": "tool", "content": "r", "tool_call_id": "1"},
            {"role": "tool", "content": None, "tool_call_id": "2"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        ]
    )
    assert template_messages(messages_of(request.messages)) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab", "name": "u"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1]}}},
                {"id": "2", "type": "function", "function": {"name": "g", "arguments": {"arguments": "not json"}}},
            ],
        },
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {"role": "tool", "content": "", "tool_call_id": "2"},
        {"role": "assistant", "content": "no"},
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"reasoning": "a"}, "a"),
        ({"reasoning_content": "b"}, "b"),
        ({"reasoning": "a", "reasoning_content": None}, "a"),
        ({"reasoning": "b", "reasoning_content": "b"}, "b"),
        ({}, None),
    ],
)
def test_reasoning_has_two_names(fields: dict[str, Any], expected: str | None) -> None:
    (message,) = messages_of(chat(messages=[{"role": "assistant", "content": "x"} | fields]).messages)
    assert message.reasoning == expected


@pytest.mark.parametrize(
    ("messages", "param", "code"),
    [
        ([], "messages", None),
        ([{"role": "user", "content": None}], "messages[0].content", None),
        ([{"role": "user"}], "messages[0].content", None),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0]",
            "unsupported_parameter",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", None),
    ],
)
def test_messages_that_cannot_be_honoured(messages: list[Any], param: str, code: str | None) -> None:
    error = refused(lambda: messages_of(chat(messages=messages).messages))
    assert (error.param, error.code) == (param, code)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", {}),
        (" \n", {}),
        ('{"a": 1}', {"a": 1}),
        ('{"a": "tru', {"arguments": '{"a": "tru'}),
        ("[1]", {"arguments": [1]}),
        ("null", {"arguments": None}),
        ('{"a":"\\ud83d"}', {"a": "\ufffd"}),
        ("[" * 9000, {"arguments": "[" * 9000}),
    ],
)
def test_arguments_of_a_history_are_objects(arguments: str, told: object) -> None:
    [message] = template_messages([Message("assistant", tool_calls=(ToolCall("1", "f", arguments),))])
    assert message["tool_calls"][0]["function"]["arguments"] == told
