"""Which tools may be called, and of what kind, over HTTP."""

import json
from typing import Any

import pytest

from tests.unit.router.tool_calls import (
    CLOCK,
    WEATHER,
    Told,
    asked,
    calls_of,
    custom,
    hermes,
    matching,
    prompt,
    refused,
    streamed,
    whole,
)

both = pytest.mark.parametrize("told", [whole, streamed])


# --- which tools --------------------------------------------------------------------------------------------------


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_only_allowed_tools_are_called_and_all_are_told() -> None:
    fields = {"tools": [WEATHER, CLOCK], "tool_choice": allowed("required", "clock")}
    constraint = asked(**fields)
    call = hermes("weather", {"place": "a"})
    assert matching(constraint, hermes("clock", {}), call) == [True, False]
    assert '"weather"' in prompt(**fields)
    for told in (whole, streamed):
        fields["tool_choice"] = allowed("auto", "clock")
        assert calls_of(told(hermes("clock", {}), **fields)) == [("clock", "{}")]
        choice = told(call, **fields)
        assert choice["message"]["content"] == call
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "choice",
    [
        allowed("auto"),
        allowed("auto", "nobody"),
        allowed("sometimes", "clock"),
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]}},
    ],
)
def test_allowed_tools_that_make_no_sense_are_refused(choice: dict[str, Any]) -> None:
    assert refused(tools=[CLOCK], tool_choice=choice)["param"] == "tool_choice"


# --- custom tools -------------------------------------------------------------------------------------------------


@both
def test_a_custom_tool_is_called_with_a_text(told: Told) -> None:
    text = 'say("é")\n\\d 😀'
    answer = hermes("code", {"input": text})
    choice = told(answer, tools=[custom("code")])
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "custom"
    assert call["id"].startswith("call_")
    assert call["custom"] == {"name": "code", "input": text}
    assert "function" not in call
    assert choice["finish_reason"] == "tool_calls"


def test_a_model_is_told_of_a_function_with_a_text() -> None:
    grammar = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /[a-z]+/"}}
    told = prompt(tools=[custom("code", grammar)])
    assert json.dumps({"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"],
                       "additionalProperties": False}) in told  # fmt: skip
    assert "start: /[a-z]+/" in told


@pytest.mark.parametrize("choice", ["required", {"type": "custom", "custom": {"name": "code"}}])
def test_a_custom_tool_can_be_forced_and_held_to_a_regular_expression(choice: Any) -> None:
    grammar = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[a-z]+|^1\n$"}}
    constraint = asked(tools=[custom("code", grammar)], tool_choice=choice)
    calls = [hermes("code", {"input": text}) for text in ("ab", "1\n", "ab1", "")]
    assert matching(constraint, *calls, hermes("code", {})) == [True, True, False, False, False]
    free = asked(tools=[custom("code")], tool_choice=choice)
    assert matching(free, hermes("code", {"input": "A 1"}), hermes("code", {"input": 1})) == [True, False]


def test_calls_of_custom_tools_come_back_in_the_next_prompt() -> None:
    call = {"id": "call_1", "type": "custom", "custom": {"name": "code", "input": "a\nb"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    told = prompt(messages=messages, tools=[custom("code")])
    assert '"function": {"arguments": {"input": "a\\nb"}, "name": "code"}' in told
    call["custom"] = None
    assert refused(messages=messages)["param"] == "messages[1].tool_calls[0].custom"


def test_custom_tools_that_make_no_sense_are_refused() -> None:
    assert refused(tools=[{"type": "custom", "custom": {}}])["param"] == "tools[0]"
    assert refused(tools=[custom("a b")])["param"] == "tools[0].custom.name"
    wrong = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "(a"}}
    assert "'code'" in refused(tools=[custom("code", wrong)], tool_choice="required")["message"]
    assert refused(tools=[{"type": "web_search"}])["code"] == "unsupported_parameter"


# --- functions, as they were before tools -------------------------------------------------------------------------

OLDER = {"functions": [WEATHER["function"], CLOCK["function"]]}


@both
def test_functions_are_answered_by_a_function_call(told: Told) -> None:
    answer = hermes("weather", {"place": "a"}) + "\n" + hermes("clock", {})
    choice = told(answer, **OLDER)
    assert choice["message"]["function_call"] == {"name": "weather", "arguments": '{"place": "a"}'}
    assert not choice["message"].get("tool_calls")
    assert choice["finish_reason"] == "function_call"
    assert told("text", **OLDER)["finish_reason"] == "stop"
    assert told(answer, function_call="none", **OLDER)["message"]["content"] == answer


def test_a_function_can_be_named() -> None:
    constraint = asked(function_call={"name": "clock"}, **OLDER)
    calls = [hermes("clock", {}), hermes("weather", {"place": "a"}), hermes("clock", {}) + "\n" + hermes("clock", {})]
    assert matching(constraint, *calls) == [True, False, False]


def test_functions_calls_and_results_are_told_as_tools() -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"place": "a"}'}},
        {"role": "function", "name": "weather", "content": "sunny"},
    ]
    told = prompt(messages=messages, **OLDER)
    assert told == prompt(
        messages=[
            messages[0],
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "call_1", "type": "function", "function": messages[1]["function_call"]}]},
            {"role": "tool", "name": "weather", "tool_call_id": "call_1", "content": "sunny"},
        ],
        tools=[WEATHER, CLOCK],
    )  # fmt: skip
    assert "sunny" in told


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [CLOCK], **OLDER}, "functions"),
        ({"function_call": {"name": "nobody"}, **OLDER}, "tool_choice"),
        ({"function_call": "always", **OLDER}, "function_call"),
        ({"function_call": {"name": "clock"}}, "tool_choice"),
        ({"functions": [{"parameters": {}}]}, "tools[0]"),
    ],
)
def test_functions_that_make_no_sense_are_refused(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields)["param"] == param
