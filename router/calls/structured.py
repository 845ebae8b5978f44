"""What an answer must look like, as a constraint. Pure."""

import json
from collections.abc import Callable
from typing import Any

import msgspec

from router.calls.errors import invalid
from router.calls.schemas import bare, loosest, softened
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.steps import Constraint

SOURCE_CHARACTERS_MAX = 65_536
"""Of what a client writes itself: a schema without its annotations, an expression, a grammar."""
SCHEMA_DEPTH_MAX = 96
CHOICES_MAX = 1024
Check = Callable[[Constraint], str]
"""Why a constraint cannot be used; empty if it can."""


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
    if too_deep(schema):
        raise invalid(f"the schema is nested more than {SCHEMA_DEPTH_MAX} levels deep", param)
    return _sized(Constraint("json_schema", json.dumps(bare(schema), ensure_ascii=False), lenient), param)


def settled(constraint: Constraint, check: Check) -> Constraint:
    """The same, or of a lenient schema what can be followed of it: the rest is left to the model.

    Raises:
        InvalidRequest: it cannot be used; says why.
    """
    wrong = check(constraint)
    if not wrong:
        return constraint
    if constraint.lenient:
        schema = json.loads(constraint.source)

        def usable(pattern: str) -> bool:
            return not check(pattern_constraint(pattern))

        for less in (softened(schema, usable), loosest(schema)):
            found = msgspec.structs.replace(constraint, source=json.dumps(less, ensure_ascii=False))
            if not check(found):
                return found
    raise InvalidRequest(wrong)


def pattern_constraint(pattern: str) -> Constraint:
    """Text that has a match of ``pattern``, as schemas mean it."""
    return Constraint("json_schema", json.dumps({"pattern": pattern}))


def _sized(constraint: Constraint, param: str) -> Constraint:
    if not 0 < len(constraint.source) <= SOURCE_CHARACTERS_MAX:
        raise invalid(f"it must have 1 to {SOURCE_CHARACTERS_MAX} characters", param)
    return constraint


def regex_constraint(value: str, param: str) -> Constraint:
    """Text that matches ``value``. Raises CallFailed if it is too large."""
    return _sized(Constraint("regex", value), param)


def grammar_constraint(value: str, param: str) -> Constraint:
    """Text of a grammar. Raises CallFailed if it is too large."""
    return _sized(Constraint("grammar", value), param)


def choice_constraint(values: list[str], param: str) -> Constraint:
    """One of ``values``. Raises CallFailed if there are none or too many of them, or one is empty."""
    if not 0 < len(values) <= CHOICES_MAX or not all(values):
        raise invalid(f"it must have 1 to {CHOICES_MAX} choices, none of them empty", param)
    alternatives = " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
    return _sized(Constraint("grammar", f"start: {alternatives}\n"), param)


def too_deep(schema: Any) -> bool:
    """Whether containers in it lie too deep in others, seen level by level: no recursion on what a stranger wrote."""
    depth, level = 0, [schema]
    while level:
        containers = [item for item in level if isinstance(item, (dict, list)) and item]
        if not containers or depth > SCHEMA_DEPTH_MAX:
            return depth > SCHEMA_DEPTH_MAX
        depth += 1
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return False
