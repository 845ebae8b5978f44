"""Random JSON schemas, of what clients write: nested objects, arrays, enums, bounds, patterns, references. Pure."""

import random
import string
from typing import Any

DEPTH_MAX = 3
_PATTERNS = ("^[A-Z]{2}-[0-9]{3}$", "^(red|green|blue)$", "[a-f0-9]{8}", "^\\d{4}-\\d{2}$")
_FORMATS = ("ipv4", "uuid")
"""Those of which library and judge have the same idea: RFC 3339 has a year 0 and leap seconds, the judge neither."""


def random_schema(source: random.Random) -> dict[str, Any]:
    """One schema; the same for the same state of ``source``."""
    schema = _object(source, 0)
    if source.random() < 0.2:
        schema["$defs"] = {"part": _scalar(source), "tree": _tree()}
        name = source.choice(("part", "tree"))
        schema["properties"]["shared"] = {"$ref": f"#/$defs/{name}"}
    return schema


def _tree() -> dict[str, Any]:
    children = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}
    return {"type": "object", "properties": {"id": {"type": "integer"}, "children": children}, "required": ["id"]}


def _schema(source: random.Random, depth: int) -> dict[str, Any]:
    if depth >= DEPTH_MAX:
        return _scalar(source)
    match source.randrange(8):
        case 0 | 1:
            return _object(source, depth)
        case 2:
            return _array(source, depth)
        case 3:
            return {"anyOf": [_scalar(source), _object(source, depth + 1)]}
        case _:
            return _scalar(source)


def _object(source: random.Random, depth: int) -> dict[str, Any]:
    names = [_word(source) for _ in range(source.randint(1, 4))]
    properties = {name: _schema(source, depth + 1) for name in names}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if source.random() < 0.8:
        schema["required"] = [name for name in properties if source.random() < 0.7]
    if source.random() < 0.7:
        schema["additionalProperties"] = False
    return schema


def _array(source: random.Random, depth: int) -> dict[str, Any]:
    low = source.randint(0, 2)
    return {
        "type": "array",
        "items": _schema(source, depth + 1),
        "minItems": low,
        "maxItems": low + source.randint(0, 2),
    }


def _scalar(source: random.Random) -> dict[str, Any]:
    match source.randrange(10):
        case 0:
            return {"type": "boolean"}
        case 1:
            return {"enum": [_word(source), source.randint(-5, 99), None, True][: source.randint(1, 4)]}
        case 2:
            return {"const": _word(source)}
        case 3:
            low = source.randint(-100, 100)
            return {"type": "integer", "minimum": low, "maximum": low + source.randint(0, 500)}
        case 4:
            return {"type": "number", "exclusiveMinimum": source.randint(-3, 3)}
        case 5:
            return {"type": "string", "pattern": source.choice(_PATTERNS)}
        case 6:
            return {"type": "string", "format": source.choice(_FORMATS)}
        case 7:
            low = source.randint(0, 4)
            return {"type": "string", "minLength": low, "maxLength": low + source.randint(0, 8)}
        case 8:
            return {"type": ["integer", "null"], "multipleOf": source.randint(1, 9)}
        case _:
            return {"type": source.choice(("string", "integer", "number", "null"))}


def _word(source: random.Random) -> str:
    return "".join(source.choice(string.ascii_lowercase) for _ in range(source.randint(1, 7)))
