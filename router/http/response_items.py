"""Items of responses, as they were told and written down."""

from collections.abc import Sequence

import msgspec

from router.http.outliving import Pair


class _Named(msgspec.Struct, frozen=True):
    """What of an item finds it in a list."""

    id: str


class _Output(msgspec.Struct):
    """What of a response that was told is gone on from."""

    output: list[msgspec.Raw]


def raw(pairs: Sequence[Pair]) -> list[tuple[str, msgspec.Raw]]:
    """Items that were written down."""
    return [(name, msgspec.Raw(item)) for name, item in pairs]


def output(told: bytes) -> list[tuple[str, msgspec.Raw]]:
    """What a response says that was told."""
    return [(id_of(item), item) for item in msgspec.json.decode(told, type=_Output).output]


def id_of(item: msgspec.Raw) -> str:
    """That of an item as it is told."""
    return msgspec.json.decode(item, type=_Named).id
