"""What this version knows of what a later one has written. Pure."""

from typing import Any

from msgspec import inspect


def known_part(value: Any, kind: inspect.Type) -> Any:
    """``value`` (of JSON) without the fields that the structs in ``kind`` do not have: a strict type reads the rest."""
    match kind:
        case inspect.StructType(fields=fields) if isinstance(value, dict):
            types = {field.encode_name: field.type for field in fields}
            return {name: known_part(inner, types[name]) for name, inner in value.items() if name in types}
        case inspect.DictType(value_type=inner) if isinstance(value, dict):
            return {name: known_part(item, inner) for name, item in value.items()}
        case inspect.TupleType(item_types=inners) if isinstance(value, list):
            return [*map(known_part, value, inners), *value[len(inners) :]]
        case inspect.ListType(item_type=inner) | inspect.VarTupleType(item_type=inner) if isinstance(value, list):
            return [known_part(item, inner) for item in value]
        case inspect.UnionType(types=types):
            for inner in types:
                if isinstance(inner, inspect.StructType | inspect.DictType | inspect.ListType | inspect.VarTupleType):
                    value = known_part(value, inner)
            return value
        case _:
            return value
