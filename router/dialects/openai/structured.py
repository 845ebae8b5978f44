"""What a request of OpenAI's form says its answer must look like. Pure."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from router.calls.call import Wanted
from router.calls.errors import invalid, unsupported
from router.calls.structured import choice_constraint, grammar_constraint, regex_constraint, schema_constraint
from tracehaul.wire.steps import Constraint

V = TypeVar("V")


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


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a request that say what its answer must look like."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # What structured_outputs was called before.
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


def wanted_of(wishes: Wishes) -> Wanted | None:
    """The one constraint that is asked for; None if none is.

    Raises:
        CallFailed: several are, one has no content or is too large, or it is of a kind that cannot be honoured.
    """
    found = [
        *_response_format(wishes.response_format),
        *_structured_outputs(wishes.structured_outputs),
        *_way("guided_json", wishes.guided_json, schema_constraint),
        *_way("guided_regex", wishes.guided_regex, regex_constraint),
        *_way("guided_choice", wishes.guided_choice, choice_constraint),
        *_way("guided_grammar", wishes.guided_grammar, grammar_constraint),
    ]
    if len(found) > 1:
        raise invalid(f"only one of {' and '.join(one.param for one in found)} is possible", found[1].param)
    return found[0] if found else None


def _response_format(wanted: ResponseFormat | None) -> Sequence[Wanted]:
    match wanted:
        case None | ResponseFormat("text"):
            return ()
        case ResponseFormat("json_object"):
            return [Wanted(schema_constraint({"type": "object"}, "response_format"), "response_format")]
        case ResponseFormat("json_schema", JsonSchema(schema=schema, strict=strict)) if schema is not None:
            param = "response_format.json_schema.schema"
            # Without strict the schema is a wish: what of it cannot be enforced is left to the model.
            return [Wanted(schema_constraint(schema, param, lenient=not strict), "response_format")]
        case ResponseFormat("json_schema"):
            raise invalid("json_schema needs a schema", "response_format.json_schema.schema")
        case ResponseFormat(kind):
            raise unsupported("response_format.type", f"response_format of type {kind[:64]!r}")


def _structured_outputs(wanted: StructuredOutputs | None) -> Sequence[Wanted]:
    if wanted is None:
        return ()
    for name in ("structural_tag", "whitespace_pattern"):
        if getattr(wanted, name) is not None:
            raise unsupported(f"structured_outputs.{name}", f"structured_outputs.{name}")
    return [
        *_way("structured_outputs.json", wanted.json, schema_constraint),
        *_way("structured_outputs.regex", wanted.regex, regex_constraint),
        *_way("structured_outputs.choice", wanted.choice, choice_constraint),
        *_way("structured_outputs.grammar", wanted.grammar, grammar_constraint),
        *_way("structured_outputs.json_object", {"type": "object"} if wanted.json_object else None, schema_constraint),
    ]


def _way(param: str, value: V | None, make: Callable[[V, str], Constraint]) -> Sequence[Wanted]:
    return () if value is None else [Wanted(make(value, param), param)]
