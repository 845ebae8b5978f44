"""JSON schemas as grammars need them: without annotations, and of what is only wished for without what cannot be. Pure.

Keywords count where a schema stands: a property may be called ``description``, and ``const``, ``enum`` and whatever is
unknown hold data, which stays as it is.
"""

from collections.abc import Callable
from typing import Any

ANNOTATIONS = frozenset(
    ("description", "title", "examples", "default", "$comment", "deprecated", "readOnly", "writeOnly")
)
"""They say nothing of what matches."""
_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"))
"""Keywords that hold schemas by name."""
_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems"))
_SINGLE = frozenset(
    (
        "items",
        "additionalItems",
        "additionalProperties",
        "unevaluatedItems",
        "unevaluatedProperties",
        "contains",
        "propertyNames",
        "not",
        "if",
        "then",
        "else",
    )
)
_TYPES = frozenset(("null", "boolean", "object", "array", "number", "string", "integer"))

Change = Callable[[dict[str, Any]], dict[str, Any]]


def bare(schema: Any) -> Any:
    """The same schema without annotations."""
    return _walked(schema, lambda found: {key: value for key, value in found.items() if key not in ANNOTATIONS})


def softened(schema: Any, usable: Callable[[str], bool]) -> Any:
    """The same schema without unknown types, and without patterns that are not ``usable``."""

    def change(found: dict[str, Any]) -> dict[str, Any]:
        kept = dict(found)
        if "type" in kept and not _known(kept["type"]):
            del kept["type"]
        if "pattern" in kept and not (isinstance(kept["pattern"], str) and usable(kept["pattern"])):
            del kept["pattern"]
        if isinstance(named := kept.get("patternProperties"), dict):
            kept["patternProperties"] = {key: value for key, value in named.items() if usable(key)}
        return kept

    return _walked(schema, change)


def loosest(schema: Any) -> dict[str, Any]:
    """What is left of a schema that cannot be followed: its type, if it has one."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    return {"type": kind} if isinstance(kind, str) and kind in _TYPES else {}


def _known(kind: Any) -> bool:
    kinds = kind if isinstance(kind, list) else [kind]
    return bool(kinds) and all(isinstance(each, str) and each in _TYPES for each in kinds)


def _walked(schema: Any, change: Change) -> Any:
    """``schema`` with ``change`` made to each schema in it. Recurses: nesting has a limit."""
    if isinstance(schema, list):  # of items, and of what a property depends on
        return [_walked(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _inside(key, value, change) for key, value in change(schema).items()}


def _inside(key: str, value: Any, change: Change) -> Any:
    if key in _NAMED and isinstance(value, dict):
        return {name: _walked(inner, change) for name, inner in value.items()}
    if (key in _LISTS and isinstance(value, list)) or key in _SINGLE:
        return _walked(value, change)
    return value
