"""Structured output, tools and reasoning over HTTP: what workers are asked, and what clients are told."""

import asyncio
import json
from typing import Any

import httpx
import msgspec
import pytest

from router.calls.fakes import FakeDispatcher, FakeText, say
from router.calls.tool_formats import ToolFormat
from router.calls.tool_grammar import calls_constraint
from router.calls.tools import Tools, format_of
from router.dialects.openai.tools import tools_of
from router.http.app import create_app
from router.http.config import ApiConfig
from tracehaul.engine.grammar import Grammars, byte_vocabulary
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.steps import Constraint

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a place",
        "parameters": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/Place"}, "days": {"type": "integer"}},
            "required": ["place"],
            "additionalProperties": False,
            "$defs": {"Place": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": {"city": "Paris"}}}\n</tool_call>'
THINKING = "{{ '<think>' }} {{ '</think>' }}"


def ask(
    answer: str,
    *,
    path: str = CHAT,
    template: str | None = None,
    reason: str = "stop",
    config: ApiConfig | None = None,
    **fields: Any,
) -> tuple[httpx.Response, FakeDispatcher]:
    """Post one call to a model that says ``answer``."""
    dispatcher, text = FakeDispatcher(say(answer, reason=reason)), FakeText()
    text.chat_template = template
    content = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    body = msgspec.json.encode({"model": "org/fake"} | content | fields)

    async def main() -> httpx.Response:
        app = create_app(dispatcher, {"org/fake": text}, lambda: b"", config or ApiConfig(), InlineOffload())
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client, asyncio.timeout(20):
            return await client.post(path, content=body)

    return asyncio.run(main()), dispatcher


def choice(answer: str, **options: Any) -> dict[str, Any]:
    response, _ = ask(answer, **options)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def deltas(answer: str, **options: Any) -> list[dict[str, Any]]:
    response, _ = ask(answer, stream=True, **options)
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def asked(**fields: Any) -> Constraint | None:
    response, dispatcher = ask("x", **fields)
    assert response.status_code == 200, response.text
    return dispatcher.requests[0].sampling.constraint


def error(**fields: Any) -> dict[str, Any]:
    response, dispatcher = ask("x", **fields)
    assert response.status_code == 400, response.text
    assert not dispatcher.requests
    return response.json()["error"]


# --- structured output ------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json_schema", '{"type": "object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            Constraint("json_schema", json.dumps(SCHEMA), lenient=True),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True}}},
            Constraint("json_schema", json.dumps(SCHEMA)),
        ),
        ({"guided_json": json.dumps(SCHEMA)}, Constraint("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": SCHEMA}}, Constraint("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json_object": True}}, Constraint("json_schema", '{"type": "object"}')),
        ({"structured_outputs": {"regex": "a+"}}, Constraint("regex", "a+")),
        ({"guided_regex": "a+"}, Constraint("regex", "a+")),
        ({"structured_outputs": {"choice": ['y"es', "né"]}}, Constraint("grammar", 'start: "y\\"es" | "né"\n')),
        ({"guided_grammar": 'root ::= "a"'}, Constraint("grammar", 'root ::= "a"')),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_what_an_answer_must_look_like_goes_to_the_workers(
    path: str, fields: dict[str, Any], constraint: Constraint | None
) -> None:
    assert asked(path=path, **fields) == constraint


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"guided_regex": "(a"}, "guided_regex", "unclosed"),
        ({"structured_outputs": {"grammar": "start: b"}}, "structured_outputs.grammar", "unknown name"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"guided_json": "{"}, "guided_json", "JSON"),
        ({"guided_json": "[" * 1000}, "guided_json", "JSON"),
        ({"guided_regex": ""}, "guided_regex", "1 to"),
        ({"guided_regex": "a" * 70_000}, "guided_regex", "65536"),
        ({"guided_choice": []}, "guided_choice", "choices"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "only one"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens", "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "guided_regex"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "yaml"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag", "not supported"),
        ({"response_format": "json"}, "response_format", "Expected"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_any_work(fields: dict[str, Any], param: str, says: str) -> None:
    told = error(**fields)
    assert told["param"] == param
    assert says in told["message"]


def test_a_schema_has_a_limit_of_depth() -> None:
    schema: dict[str, Any] = {}
    for _ in range(120):
        schema = {"items": schema}
    assert "deep" in error(guided_json=schema)["message"]


# --- tools ------------------------------------------------------------------------------------------------------


def test_a_call_is_told_whole() -> None:
    told = choice(f"Let me see.\n{CALL}", tools=[WEATHER, CLOCK])
    message = told["message"]
    assert told["finish_reason"] == "tool_calls"
    assert message["content"] == "Let me see."
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "weather", "arguments": '{"place": {"city": "Paris"}}'}
    assert choice(CALL, tools=[WEATHER])["message"]["content"] is None


def test_a_call_is_told_in_pieces() -> None:
    told = deltas(f"{CALL}\n{CALL}", tools=[WEATHER])
    pieces = [call for each in told for call in each["delta"].get("tool_calls", [])]
    first = [piece for piece in pieces if "id" in piece]
    assert [piece["index"] for piece in first] == [0, 1]
    assert [(p["type"], p["function"]["name"], p["function"]["arguments"]) for p in first] == [
        ("function", "weather", "")
    ] * 2
    assert first[0]["id"] != first[1]["id"]
    assert all(set(piece) == {"index", "function"} for piece in pieces if "id" not in piece)
    arguments = ["".join(p["function"]["arguments"] for p in pieces if p["index"] == index) for index in (0, 1)]
    assert arguments == ['{"place": {"city": "Paris"}}'] * 2
    assert [each["finish_reason"] for each in told if each["finish_reason"]] == ["tool_calls"]
    assert not any(each["delta"].get("content") for each in told)


def test_a_half_call_is_content_and_a_cut_one_a_call() -> None:
    half = choice('Hm. <tool_call>{"na', tools=[WEATHER], reason="length")
    assert (half["message"]["content"], half["finish_reason"]) == ('Hm. <tool_call>{"na', "length")
    cut = choice(CALL[:50], tools=[WEATHER], reason="length")
    assert cut["message"]["tool_calls"][0]["function"]["arguments"] == CALL[45:50]
    assert cut["finish_reason"] == "length"


def test_without_tools_or_with_none_chosen_nothing_is_a_call() -> None:
    for fields in ({}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}):
        assert choice(CALL, **fields)["message"]["content"] == CALL


def test_one_call_alone_where_more_are_not_wanted() -> None:
    told = choice(f"{CALL}\n{CALL}", tools=[WEATHER], parallel_tool_calls=False)
    assert len(told["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tools": [{"type": "custom"}]}, "tools[0]"),
        ({"tools": [WEATHER, {"type": "function", "function": {"name": "a b"}}]}, "tools[1].function.name"),
        ({"tools": [WEATHER] * 600}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "what"}}}
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_tools_that_make_no_sense_are_refused(fields: dict[str, Any], param: str) -> None:
    assert error(**fields)["param"] == param


def plain(text: str) -> None:
    """No text is a special token."""


def matches(constraint: Constraint, text: str) -> bool:
    """Whether ``text`` is a whole answer."""

    async def main() -> bool:
        grammars = Grammars(lambda: byte_vocabulary(256))
        try:
            guide = await grammars.guide(constraint, list(text.encode()))
            mask = guide.mask()
            return mask is not None and bool(mask[-1] >> 31)
        except InvalidRequest as refused:
            if "does not match" in str(refused):
                return False
            raise
        finally:
            grammars.close()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("form", "one", "several"),
    [
        ("hermes", "<tool_call>\n{}\n</tool_call>", "\n"),
        ("mistral", "[TOOL_CALLS][{}]", None),
        ("llama3", "{}", "; "),
    ],
)
def test_a_forced_call_can_be_nothing_else(form: ToolFormat, one: str, several: str | None) -> None:
    key = "parameters" if form == "llama3" else "arguments"
    good = one.replace("{}", json.dumps({"name": "weather", key: {"place": {"city": "Rome"}, "days": 2}}))
    clock = one.replace("{}", json.dumps({"name": "clock", key: {}}))
    bad = one.replace("{}", json.dumps({"name": "weather", key: {"place": {}}}))
    required = tools_of([WEATHER, CLOCK], "required", None)
    named = tools_of([WEATHER, CLOCK], {"type": "function", "function": {"name": "weather"}}, False)
    assert required is not None
    assert named is not None

    def constraint_of(tools: Tools) -> Constraint:
        return calls_constraint(tools, form, plain, lambda _: "")

    assert matches(constraint_of(required), good)
    assert matches(constraint_of(required), clock)
    assert matches(constraint_of(named), good)
    assert not matches(constraint_of(named), clock)
    for constraint in (constraint_of(required), constraint_of(named)):
        assert not matches(constraint, bad)
        assert not matches(constraint, "Hello")
    if several is not None:
        assert matches(constraint_of(required), good + several + clock)
        assert not matches(constraint_of(named), good + several + good)


def test_a_schema_and_tools_leave_both_open() -> None:
    constraint = asked(tools=[WEATHER], response_format={"type": "json_object"})
    assert constraint is not None
    assert matches(constraint, '{"answer": 42}')
    assert matches(constraint, CALL)
    assert not matches(constraint, "text")


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, "hermes"),
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("... [TOOL_CALLS] ...", "mistral"),
        ("Environment: ipython", "llama3"),
        ("<|python_tag|>", "llama3"),
    ],
)
def test_the_template_tells_how_calls_are_written(template: str | None, form: ToolFormat) -> None:
    assert format_of(template) == form


def test_the_operator_may_say_how_calls_are_written() -> None:
    call = '[TOOL_CALLS][{"name": "clock", "arguments": {}}]'
    told = choice(call, tools=[CLOCK], config=ApiConfig(tool_format="mistral"))
    assert told["message"]["tool_calls"][0]["function"]["name"] == "clock"
    assert len(told["message"]["tool_calls"][0]["id"]) == 9


def test_calls_and_their_results_come_back_in_the_next_prompt() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    response, dispatcher = ask("x", messages=messages, tools=[CLOCK])
    assert response.status_code == 200, response.text
    assert "noon" in FakeText().stream().push(unpack_tokens(dispatcher.requests[0].prompt))


# --- reasoning --------------------------------------------------------------------------------------------------


def test_reasoning_is_told_apart() -> None:
    response, _ = ask("<think>\nhm\n</think>\n\nYes.", template=THINKING)
    body = response.json()
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Yes.")
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": len("<think>\nhm\n</think>")}
    told = deltas("<think>\nhm\n</think>\n\nYes.", template=THINKING)
    assert "".join(each["delta"].get("reasoning_content", "") for each in told) == "hm"
    assert "".join(each["delta"].get("content", "") for each in told) == "Yes."


def test_a_model_that_does_not_reason_may_say_the_word() -> None:
    response, _ = ask("<think>hm</think>")
    body = response.json()
    assert body["choices"][0]["message"]["content"] == "<think>hm</think>"
    assert "reasoning_content" not in body["choices"][0]["message"]
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_a_prompt_may_have_opened_the_reasoning() -> None:
    messages = [{"role": "user", "content": "x"}]

    class Opening(FakeText):
        def render(self, *arguments: Any, **options: Any) -> str:
            return super().render(*arguments, **options) + "<think>\n"

    dispatcher, text = FakeDispatcher(say("hm\n</think>\n\n{}")), Opening()
    text.chat_template = THINKING

    async def main() -> httpx.Response:
        app = create_app(dispatcher, {"org/fake": text}, lambda: b"", ApiConfig(), InlineOffload())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            body = {"model": "org/fake", "messages": messages, "response_format": {"type": "json_object"}}
            return await client.post(CHAT, json=body)

    message = asyncio.run(main()).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "{}")
    constraint = dispatcher.requests[0].sampling.constraint
    assert constraint is not None
    assert constraint.thinking == "opened"
    assert matches(constraint, "so\n</think>\n\n{}")


def test_reasoning_comes_before_calls() -> None:
    told = choice(f"<think>hm</think>\n{CALL}", template=THINKING + "<tool_call>", tools=[WEATHER])
    assert told["message"]["reasoning_content"] == "hm"
    assert told["message"]["tool_calls"][0]["function"]["name"] == "weather"
    constraint = asked(template=THINKING + "<tool_call>", tools=[WEATHER], tool_choice="required")
    assert constraint is not None
    assert matches(constraint, f"<think>hm</think>\n{CALL}")
    assert matches(constraint, CALL)
