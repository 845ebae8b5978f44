"""What a request says its answer must look like, as a constraint. Pure."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from router.api.errors import bad_request, unsupported
from tracehaul.wire.steps import CONSTRAINT_CHARACTERS_MAX, Constraint

SCHEMA_DEPTH_MAX = 96
CHOICES_MAX = 1024


class JsonSchema(msgspec.Struct, frozen=True):
    """The inside of a ``response_format`` of type ``json_schema``."""

    name: str = ""
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """OpenAI's ``response_format``."""

    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, frozen=True):
    """``structured_outputs`` as vLLM has it: one of its ways."""

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: str | None = None


class Wishes(msgspec.Struct, frozen=True):
    """The fields of a request that say what its answer must look like."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


def constraint(wishes: Wishes) -> tuple[Constraint, str] | None:
    """The one constraint that is asked for, and the parameter that asks for it; None if none is.

    Raises:
        ApiError: several are, one has no content or is too large, or it is of a kind that cannot be honoured.
    """
    found = [
        *_response_format(wishes.response_format),
        *_structured_outputs(wishes.structured_outputs),
        *_way("guided_json", wishes.guided_json, schema_constraint),
        *_way("guided_regex", wishes.guided_regex, _regex),
        *_way("guided_choice", wishes.guided_choice, _choice),
        *_way("guided_grammar", wishes.guided_grammar, _grammar),
    ]
    if len(found) > 1:
        raise bad_request(f"only one of {' and '.join(name for _, name in found)} is possible", found[1][1])
    return found[0] if found else None


def schema_constraint(schema: str | dict[str, Any] | bool, param: str, *, lenient: bool = False) -> Constraint:
    """JSON that matches ``schema``, which may be JSON text itself.

    Raises:
        ApiError: it is no JSON object, or too large or nested too deeply.
    """
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema, type=dict[str, Any] | bool)
        except (ValueError, RecursionError) as error:
            raise bad_request(f"the schema is no JSON object: {error}", param) from None
    if _depth(schema) > SCHEMA_DEPTH_MAX:
        raise bad_request(f"the schema is nested more than {SCHEMA_DEPTH_MAX} levels deep", param)
    return sized(Constraint("json_schema", json.dumps(schema, ensure_ascii=False), lenient), param)


def sized(constraint: Constraint, param: str) -> Constraint:
    """The same. Raises ApiError if it is too large for the workers."""
    if not 0 < len(constraint.source) <= CONSTRAINT_CHARACTERS_MAX:
        raise bad_request(f"it must have 1 to {CONSTRAINT_CHARACTERS_MAX} characters", param)
    return constraint


def _response_format(wanted: ResponseFormat | None) -> Sequence[tuple[Constraint, str]]:
    match wanted:
        case None | ResponseFormat("text"):
            return ()
        case ResponseFormat("json_object"):
            return [(schema_constraint({"type": "object"}, "response_format"), "response_format")]
        case ResponseFormat("json_schema", JsonSchema(schema=schema, strict=strict)) if schema is not None:
            param = "response_format.json_schema.schema"
            # Without strict the schema is a wish: what of it cannot be enforced is left to the model.
            return [(schema_constraint(schema, param, lenient=not strict), "response_format")]
        case ResponseFormat("json_schema"):
            raise bad_request("json_schema needs a schema", "response_format.json_schema.schema")
        case ResponseFormat(kind):
            raise unsupported("response_format.type", f"response_format of type {kind[:64]!r}")


def _structured_outputs(wanted: StructuredOutputs | None) -> Sequence[tuple[Constraint, str]]:
    if wanted is None:
        return ()
    for name in ("structural_tag", "whitespace_pattern"):
        if getattr(wanted, name) is not None:
            raise unsupported(f"structured_outputs.{name}", f"structured_outputs.{name}")
    return [
        *_way("structured_outputs.json", wanted.json, schema_constraint),
        *_way("structured_outputs.regex", wanted.regex, _regex),
        *_way("structured_outputs.choice", wanted.choice, _choice),
        *_way("structured_outputs.grammar", wanted.grammar, _grammar),
        *_way("structured_outputs.json_object", {"type": "object"} if wanted.json_object else None, schema_constraint),
    ]


def _way(param: str, value: Any, make: Any) -> Sequence[tuple[Constraint, str]]:
    return () if value is None else [(make(value, param), param)]


def _regex(value: str, param: str) -> Constraint:
    return sized(Constraint("regex", value), param)


def _grammar(value: str, param: str) -> Constraint:
    return sized(Constraint("grammar", value), param)


def _choice(values: list[str], param: str) -> Constraint:
    if not 0 < len(values) <= CHOICES_MAX or not all(values):
        raise bad_request(f"it must have 1 to {CHOICES_MAX} choices, none of them empty", param)
    alternatives = " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
    return sized(Constraint("grammar", f"start: {alternatives}\n"), param)


def _depth(value: Any) -> int:
    """Of containers in containers, counted level by level: no recursion on what a stranger wrote."""
    depth, level = 0, [value]
    while level:
        containers = [item for item in level if isinstance(item, (dict, list)) and item]
        if not containers or depth > SCHEMA_DEPTH_MAX:
            return depth
        depth += 1
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return depth
