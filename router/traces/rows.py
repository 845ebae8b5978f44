"""Structs as rows of bytes: what is kept by the hundred thousand and looked at by hand. Pure.

A row has values only, no names: a tenth of the memory of the object, and nothing for the garbage collector to visit.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from router.policy.retention import Retention, Situation
from router.traces.hits import Changed, Hits

LENGTH_BYTES = 4


class Pause(msgspec.Struct, frozen=True, gc=False):
    """What a trace did between two steps."""

    tools: tuple[str, ...]
    """What the earlier step called; empty: what it said was answered otherwise."""
    seconds: float


_NESTED: dict[str, type[msgspec.Struct]] = {
    "hits": Hits,
    "changed": Changed,
    "pause": Pause,
    "situation": Situation,
    "retention": Retention,
}
"""Fields that are structs themselves."""
_encode = msgspec.msgpack.Encoder().encode
_decode: msgspec.msgpack.Decoder[list[Any]] = msgspec.msgpack.Decoder(list)


def packed(value: msgspec.Struct, *first: float) -> bytes:
    """A row of ``first`` and a struct's values."""
    return _encode([*first, *_values(value)])


def unpacked(row: bytes) -> list[Any]:
    """A row's values."""
    return _decode.decode(row)


def named(kind: type[msgspec.Struct], values: list[Any]) -> dict[str, Any]:
    """A struct's values with their names, as :func:`msgspec.convert` takes them."""
    return {
        name: named(_NESTED[name], value) if name in _NESTED and value is not None else value
        for name, value in zip(kind.__struct_fields__, values, strict=True)
    }


class Rows(msgspec.Struct, frozen=True, gc=False):
    """Rows one behind the other, the oldest first."""

    data: bytes = b""
    count: int = 0

    def __iter__(self) -> Iterator[bytes]:
        at = 0
        while at < len(self.data):
            begin = at + LENGTH_BYTES
            at = begin + int.from_bytes(self.data[at:begin], "little")
            yield self.data[begin:at]

    def added(self, row: bytes, rows_max: int) -> "Rows":
        """With one more; of more than ``rows_max`` the oldest goes."""
        data, count = self.data, self.count
        if count == rows_max:
            data = data[LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little") :]
            count -= 1
        return Rows(data + len(row).to_bytes(LENGTH_BYTES, "little") + row, count + 1)


def _values(value: msgspec.Struct) -> list[Any]:
    return [_values(v) if isinstance(v, msgspec.Struct) else v for v in msgspec.structs.astuple(value)]
