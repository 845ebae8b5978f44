"""What an answer must look like, as a constraint. Pure."""

import json
from typing import Any

import msgspec

from router.calls.errors import invalid
from tracehaul.wire.steps import CONSTRAINT_CHARACTERS_MAX, Constraint

SCHEMA_DEPTH_MAX = 96
CHOICES_MAX = 1024


def schema_constraint(schema: str | dict[str, Any] | bool, param: str, *, lenient: bool = False) -> Constraint:
    """JSON that matches ``schema``, which may be JSON text itself.

    Raises:
        CallFailed: it is no JSON object, or too large or nested too deeply.
    """
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema, type=dict[str, Any] | bool)
        except (ValueError, RecursionError) as error:
            raise invalid(f"the schema is no JSON object: {error}", param) from None
    if _depth(schema) > SCHEMA_DEPTH_MAX:
        raise invalid(f"the schema is nested more than {SCHEMA_DEPTH_MAX} levels deep", param)
    return sized(Constraint("json_schema", json.dumps(schema, ensure_ascii=False), lenient), param)


def sized(constraint: Constraint, param: str) -> Constraint:
    """The same. Raises CallFailed if it is too large for the workers."""
    if not 0 < len(constraint.source) <= CONSTRAINT_CHARACTERS_MAX:
        raise invalid(f"it must have 1 to {CONSTRAINT_CHARACTERS_MAX} characters", param)
    return constraint


def regex_constraint(value: str, param: str) -> Constraint:
    """Text that matches ``value``. Raises CallFailed if it is too large."""
    return sized(Constraint("regex", value), param)


def grammar_constraint(value: str, param: str) -> Constraint:
    """Text of a grammar. Raises CallFailed if it is too large."""
    return sized(Constraint("grammar", value), param)


def choice_constraint(values: list[str], param: str) -> Constraint:
    """One of ``values``. Raises CallFailed if there are none or too many of them, or one is empty."""
    if not 0 < len(values) <= CHOICES_MAX or not all(values):
        raise invalid(f"it must have 1 to {CHOICES_MAX} choices, none of them empty", param)
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
