"""Calls that models write, over HTTP: whole objects or content, in one piece and streamed."""

import json
from typing import Any

import pytest

from tests.unit.router.tool_calls import (
    CLOCK,
    LLAMA,
    MISTRAL,
    WEATHER,
    Told,
    asked,
    calls_of,
    hermes,
    matching,
    streamed,
    whole,
)

both = pytest.mark.parametrize("told", [whole, streamed])


# --- calls are whole objects --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"place": "a\nb"}', {"place": "a\nb"}),
        ('{"place": "a",}', {"place": "a"}),
        ('{"place": "a", "now": True}', {"place": "a", "now": True}),
        ('{"place": "C:\\dir"}', {"place": "C:\\dir"}),
        ('"{\\"place\\": \\"a\\"}"', {"place": "a"}),
        ('""', {}),
    ],
)
def test_slips_in_arguments_are_mended(told: Told, written: str, arguments: dict[str, Any]) -> None:
    choice = told(f'<tool_call>{{"name": "weather", "arguments": {written}}}</tool_call>', tools=[WEATHER])
    assert choice["finish_reason"] == "tool_calls"
    assert [(name, json.loads(text)) for name, text in calls_of(choice)] == [("weather", arguments)]
    assert not choice["message"]["content"]


@pytest.mark.parametrize("written", ["[1]", "{place: 1}", '{"place": "a" "b"}', "7"])
def test_arguments_that_cannot_be_mended_are_content_to_the_letter(written: str) -> None:
    answer = f'Well. <tool_call>{{"name": "weather", "arguments": {written}}}</tool_call>!'
    choice = whole(answer, tools=[WEATHER])
    assert choice["message"]["content"] == answer
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    in_pieces = streamed(answer, tools=[WEATHER])
    assert in_pieces["message"]["content"] == answer
    assert in_pieces["finish_reason"] == "stop"


def test_a_whole_answer_promises_what_a_stream_that_took_a_call_back_cannot() -> None:
    answer = f'<tool_call>{{"name": "weather", "arguments": {{"a": b}}}}</tool_call>{hermes("clock", {})}'
    choice = whole(answer, tools=[WEATHER, CLOCK])
    assert calls_of(choice) == [("clock", "{}")]
    assert choice["finish_reason"] == "tool_calls"
    in_pieces = streamed(answer, tools=[WEATHER, CLOCK])
    assert in_pieces["finish_reason"] == "stop"
    assert calls_of(in_pieces)[-1] == ("clock", "{}")


@both
@pytest.mark.parametrize("fields", [{}, {"tool_choice": "required"}])
def test_a_call_that_a_stop_string_cuts_is_no_promise(told: Told, fields: dict[str, Any]) -> None:
    choice = told('<tool_call>\n{"name": "weather", "arguments": {"place": "東京 日本"}}\n</tool_call>',
                  tools=[WEATHER], stop=["日"], **fields)  # fmt: skip
    assert choice["finish_reason"] == "stop"
    assert calls_of(choice) == [("weather", '{"place": "東京 ')]
    assert not choice["message"]["content"]


@both
def test_a_call_that_its_model_ends_or_the_limit_cuts_is_no_promise(told: Told) -> None:
    answer = '<tool_call>\n{"name": "weather", "arguments": {"place": "a'
    assert told(answer, tools=[WEATHER])["finish_reason"] == "stop"
    assert told(answer, tools=[WEATHER], reason="length")["finish_reason"] == "length"
    # One that is whole, and another that is not.
    assert told(f"{hermes('clock', {})}\n{answer}", tools=[WEATHER, CLOCK])["finish_reason"] == "stop"


@both
def test_a_stop_string_after_the_arguments_cuts_nothing(told: Told) -> None:
    choice = told(hermes("weather", {"place": "a"}), tools=[WEATHER], stop=["</tool_call>"])
    assert choice["finish_reason"] == "tool_calls"
    assert calls_of(choice) == [("weather", '{"place": "a"}')]


# --- Llama 3 ------------------------------------------------------------------------------------------------------


@both
def test_several_calls_of_llama_are_told(told: Told) -> None:
    answer = '{"name": "weather", "parameters": {"place": "a"}}; {"name": "clock", "parameters": {}}'
    choice = told(answer, template=LLAMA, tools=[WEATHER, CLOCK])
    assert calls_of(choice) == [("weather", '{"place": "a"}'), ("clock", "{}")]
    assert choice["finish_reason"] == "tool_calls"


@both
@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "weather", "parameters": {"place": "a"}, "mood": 1}',
        '{"name": "weather", "parameters": {"place": "a',
        '{"name": "weather", "parameters": [1]}',
        '{"name": "Bob", "parameters": {}}',
    ],
)
def test_llama_calls_wholly_or_says_it_wholly(told: Told, answer: str) -> None:
    choice = told(answer, template=LLAMA, tools=[WEATHER])
    assert choice["message"]["content"] == answer
    assert not calls_of(choice)
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("wanted", ["json_object", "json_schema"])
def test_with_a_schema_and_tools_llama_may_do_either(wanted: str) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}, "additionalProperties": False}
    form = {"type": wanted} | ({"json_schema": {"name": "x", "schema": schema}} if wanted == "json_schema" else {})
    fields = {"template": LLAMA, "tools": [WEATHER], "response_format": form}
    call = '{"name": "weather", "parameters": {"place": "a"}}'
    constraint = asked(**fields)
    assert matching(constraint, '{"answer": 42}', call, "text") == [True, True, False]
    for told in (whole, streamed):
        assert calls_of(told(call, **fields)) == [("weather", '{"place": "a"}')]
        assert told('{"answer": 42}', **fields)["message"]["content"] == '{"answer": 42}'


# --- forced calls -------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        ('<tool_call>\n{"na', []),
        ('<tool_call>\n{"name": "weather", "arguments": {"pl', [("weather", '{"pl')]),
        (hermes("clock", {}) + "\n<", [("clock", "{}")]),
        (hermes("clock", {}) + "\n<tool_call>\n{", [("clock", "{}")]),
    ],
)
def test_what_a_limit_leaves_of_forced_calls_is_no_content(
    told: Told, answer: str, calls: list[tuple[str, str]]
) -> None:
    choice = told(answer, tools=[WEATHER, CLOCK], tool_choice="required", reason="length")
    assert not choice["message"]["content"]
    assert calls_of(choice) == calls
    assert choice["finish_reason"] == "length"


# --- ids that models give -----------------------------------------------------------------------------------------

IDS_LAST = MISTRAL + '{"name": {{ call.name }}, "id": {{ call.id }}}'


def ids(choice: dict[str, Any]) -> list[str]:
    return [call["id"] for call in choice["message"]["tool_calls"]]


@both
@pytest.mark.parametrize(
    "answer",
    [
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"place": "a"}, "id": "abc123DEF"}]',
        '[TOOL_CALLS]weather[CALL_ID]abc123DEF[ARGS]{"place": "a"}',
    ],
)
def test_the_id_that_a_model_gave_is_told(told: Told, answer: str) -> None:
    choice = told(answer, template=IDS_LAST, tools=[WEATHER])
    assert ids(choice) == ["abc123DEF"]
    assert calls_of(choice) == [("weather", '{"place": "a"}')]


@both
def test_ids_that_cannot_be_used_are_made(told: Told) -> None:
    def call(chosen: str) -> str:
        return f'{{"name": "clock", "arguments": {{}}, "id": "{chosen}"}}'

    before = {"id": "abc123DEF", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [before]},
        {"role": "tool", "tool_call_id": "abc123DEF", "content": "noon"},
    ]
    chosen = ["abc123DEF", "new456GHI", "new456GHI", "call_1", "é23456789", ""]
    answer = f"[TOOL_CALLS] [{', '.join(map(call, chosen))}]"
    found = ids(told(answer, template=IDS_LAST, tools=[CLOCK], messages=messages))
    assert found[1] == "new456GHI"
    assert len({*found, "abc123DEF"}) == 7
    assert all(len(one) == 9 and one.isascii() and one.isalnum() for one in found)


@both
def test_where_no_ids_come_last_arguments_are_told_as_they_come(told: Told) -> None:
    answer = '[TOOL_CALLS] [{"name": "weather", "arguments": {"place": "a"}, "id": "abc123DEF"}]'
    (found,) = ids(told(answer, template=MISTRAL, tools=[WEATHER]))
    assert len(found) == 9
    assert found != "abc123DEF"
