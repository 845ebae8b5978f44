"""Schemas without what a grammar has no use for: only where it is a keyword."""

from typing import Any

import pytest

from router.calls.schemas import bare, loosest, softened


@pytest.mark.parametrize(
    ("schema", "left"),
    [
        ({"title": "T", "description": "d", "type": "object", "$comment": "c"}, {"type": "object"}),
        (
            {"properties": {"description": {"type": "string", "description": "d"}, "default": {"default": 1}}},
            {"properties": {"description": {"type": "string"}, "default": {}}},
        ),
        (
            {"const": {"title": "x", "$ref": "#/no"}, "enum": [{"description": 1}]},
            {"const": {"title": "x", "$ref": "#/no"}, "enum": [{"description": 1}]},
        ),
        ({"anyOf": [{"title": "a"}, True], "items": [{"title": "b"}]}, {"anyOf": [{}, True], "items": [{}]}),
        ({"$defs": {"title": {"title": "x", "type": "null"}}}, {"$defs": {"title": {"type": "null"}}}),
        ({"$ref": "#/$defs/A", "examples": [1]}, {"$ref": "#/$defs/A"}),
        ({"$anchor": "here", "x-mine": {"title": 1}}, {"$anchor": "here", "x-mine": {"title": 1}}),
        ({"not": {"default": 1}, "if": {"title": "t"}}, {"not": {}, "if": {}}),
        ({"dependencies": {"title": ["default"]}}, {"dependencies": {"title": ["default"]}}),
        (True, True),
    ],
)  # fmt: skip
def test_annotations_go_and_names_and_data_stay(schema: Any, left: Any) -> None:
    assert bare(schema) == left


def test_what_cannot_be_followed_goes_alone() -> None:
    schema = {
        "type": "object",
        "properties": {
            "type": {"type": "any", "minLength": 1},
            "pattern": {"type": "string", "pattern": "(?!a)"},
            "b": {"type": ["string", "date"], "pattern": "b"},
        },
        "patternProperties": {"(?!a)": {}, "b": {"type": "what"}},
    }
    assert softened(schema, lambda pattern: "(?!" not in pattern) == {
        "type": "object",
        "properties": {"type": {"minLength": 1}, "pattern": {"type": "string"}, "b": {"pattern": "b"}},
        "patternProperties": {"b": {}},
    }


def test_a_type_is_the_last_that_goes() -> None:
    assert loosest({"type": "array", "minItems": "x"}) == {"type": "array"}
    assert loosest({"type": "list"}) == loosest({"type": ["string"]}) == loosest(True) == {}
