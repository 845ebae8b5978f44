"""Schemas of many tools, over HTTP: what workers are asked to hold answers to, and what is refused."""

import json
from typing import Any

import pytest

from tests.unit.router.tool_calls import CLOCK, PLACE, asked, function, hermes, matching, prompt, refused

STRICT = {**PLACE, "additionalProperties": False}
UNIQUE = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}, "required": ["tags"]}


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_each_tool_is_as_strict_as_it_says(choice: str) -> None:
    tools = [function("weather", STRICT, strict=True), function("tag", UNIQUE)]
    form = {"response_format": {"type": "json_object"}} if choice == "auto" else {}
    constraint = asked(tools=tools, tool_choice=choice, **form)
    good = hermes("weather", {"place": "a"}), hermes("tag", {"tags": [1, 1]})
    bad = hermes("weather", {"place": 1}), hermes("weather", {"place": "a", "b": 1}), hermes("tag", {"tags": 1})
    assert matching(constraint, *good, *bad) == [True, True, False, False, False]


@pytest.mark.parametrize(
    "inside",
    [
        {"type": "string", "pattern": "^(?!foo).{1,5}$"},
        {"type": "string", "pattern": r"(a)\1"},
        {"type": "any"},
        {"type": "string", "minLength": "3"},
        {"$ref": "#/nowhere"},
        {"type": "string", "format": "moon-phase"},
        {"not": {"type": "null"}},
    ],
)
def test_what_cannot_be_enforced_is_left_to_the_model_unless_it_is_strict(inside: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"place": inside, "days": {"type": "integer"}}, "required": ["place"]}
    lenient, strict = function("weather", schema), function("weather", schema, strict=True)
    call = hermes("weather", {"place": "abc", "days": 1})
    assert matching(asked(tools=[CLOCK, lenient], tool_choice="required"), call, "text") == [True, False]
    assert "'weather'" in refused(tools=[CLOCK, strict], tool_choice="required")["message"]
    # The same of an answer's schema.
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert matching(asked(response_format=form), '{"place": "abc"}', "[]") == [True, False]
    form["json_schema"] = {"name": "x", "schema": schema, "strict": True}
    assert refused(response_format=form)["param"] == "response_format"


def test_only_what_cannot_be_enforced_is_left_to_the_model() -> None:
    schema = {"type": "object", "properties": {"a": {"pattern": "(?!x)", "type": "string"}, "n": {"type": "integer"}}}
    constraint = asked(tools=[function("f", schema)], tool_choice="required")
    good, bad = hermes("f", {"a": "x", "n": 1}), hermes("f", {"a": "x", "n": "y"})
    assert matching(constraint, good, bad, hermes("f", {"a": 1})) == [True, False, False]


def described(at: int) -> dict[str, Any]:
    words = "What a person has to know of it, at length. " * 12
    names = [f"first_{at}", "description", "default"]
    properties = {name: {"type": "string", "description": words, "title": name, "default": "x"} for name in names}
    return function(f"tool_{at}", {"type": "object", "properties": properties, "required": names}, description=words)


@pytest.mark.parametrize(
    "fields",
    [{"tool_choice": "required"}, {"response_format": {"type": "json_object"}}],
    ids=["required", "or an answer"],
)
def test_five_hundred_tools_with_long_descriptions_are_held_to_their_schemas(fields: dict[str, Any]) -> None:
    tools = [described(at) for at in range(512)]
    assert len(json.dumps(tools[0])) > 2000
    constraint = asked(tools=tools, **fields)
    call = {"first_500": "a", "description": "b", "default": "c"}
    assert matching(constraint, hermes("tool_500", call), hermes("tool_499", call)) == [True, False]
    assert "at length" not in constraint.source
    assert "at length" in prompt(tools=tools[:1], **fields)


def test_tools_that_are_too_much_for_a_grammar_are_left_to_the_model_the_largest_first() -> None:
    def large(at: int) -> dict[str, Any]:
        inner = {"type": "object", "properties": {"left": {"type": "string"}, "right": {"enum": ["a", f"b{at}"]}}}
        names = [f"property_{at}_{k}" for k in range(12)]
        properties = {name: {"type": "array", "items": inner} for name in names}
        return function(f"large_{at}", {"type": "object", "properties": properties})

    tools = [*(large(at) for at in range(511)), function("small", STRICT, strict=True)]
    constraint = asked(tools=tools, tool_choice="required")
    assert matching(
        constraint,
        hermes("small", {"place": "a"}),
        hermes("small", {"place": 1}),
        hermes("large_510", {"x": 1}),
        hermes("large_510", [1]),
        hermes("nobody", {}),
    ) == [True, False, True, False, False]


def test_references_arrive_as_they_were_written() -> None:
    schema = {
        "$id": "https://example.com/place",
        "type": "object",
        "properties": {
            "anchored": {"$ref": "#city"},
            "pointed": {"$ref": "#/properties/anchored"},
            "absolute": {"$ref": "https://example.com/place#/$defs/City"},
            "data": {"const": {"$ref": "#/not/a/reference"}},
            "chosen": {"enum": [{"$ref": "#/neither"}]},
        },
        "additionalProperties": False,
        "$defs": {"City": {"$anchor": "city", "type": "string", "enum": ["Rome"]}},
    }
    other = {**schema, "$defs": {"City": {"$anchor": "city", "type": "integer"}}}
    constraint = asked(tools=[function("a", schema, strict=True), function("b", other)], tool_choice="required")
    good = {"anchored": "Rome", "pointed": "Rome", "absolute": "Rome", "data": {"$ref": "#/not/a/reference"},
            "chosen": {"$ref": "#/neither"}}  # fmt: skip
    assert matching(
        constraint,
        hermes("a", good),
        hermes("b", {"anchored": 7}),
        hermes("a", {"anchored": 7}),
        hermes("b", {"anchored": "Rome"}),
        hermes("a", {"data": {"$ref": "#/$defs/p0/not/a/reference"}}),
    ) == [True, True, False, False, False]


def test_a_schema_that_is_too_large_alone_is_left_to_the_model_unless_it_is_strict() -> None:
    chain = {f"a{at}": {"$ref": f"#/$defs/a{at + 1}"} for at in range(30_000)}
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a0"}}, "$defs": {**chain, "a30000": {}}}
    constraint = asked(tools=[function("f", schema), CLOCK], tool_choice="required")
    assert matching(constraint, hermes("f", {"a": 1}), hermes("f", [1])) == [True, False]
    told = refused(tools=[function("f", schema, strict=True)], tool_choice="required")["message"]
    assert "'f'" in told
    assert "65536" in told


def test_a_schema_that_is_nested_too_deeply_is_left_to_the_model_unless_it_is_strict() -> None:
    schema: dict[str, Any] = {}
    for _ in range(120):
        schema = {"items": schema}
    schema["type"] = "object"
    assert matching(asked(tools=[function("f", schema)], tool_choice="required"), hermes("f", {})) == [True]
    assert "deep" in refused(tools=[function("f", schema, strict=True)], tool_choice="required")["message"]
