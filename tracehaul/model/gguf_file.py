"""GGUF files: metadata and where each tensor lies, without the tensors and without torch.

The format: magic, version, counts, then typed key-value pairs, then one record per tensor, then aligned data.
Read straight from a memory map, so that a process that only wants the tokenizer stays small.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

import msgspec

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_COUNT_MAX = 1 << 24
_STRING = 8
_ARRAY = 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GGUFError(Exception):
    """The file is not a GGUF file of a version that we read, or it is damaged."""


class GGUFTensor(msgspec.Struct, frozen=True):
    """Where one tensor lies."""

    shape: tuple[int, ...]
    """As the file has it: fastest-running dimension first."""
    kind: int
    """GGML type number."""
    offset: int
    """From the start of the file, in bytes."""


class GGUFFile(msgspec.Struct, frozen=True):
    """What a GGUF file's header says."""

    path: Path
    metadata: dict[str, Any]
    """Values as Python's own: numbers, strings, lists."""
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Parse a header.

    Raises:
        GGUFError: not a GGUF file, an unknown version, or damaged.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(data).read(path)
        except (ValueError, struct.error, KeyError, IndexError, UnicodeDecodeError) as error:
            raise GGUFError(f"{path} is not a readable GGUF file: {error}") from error


class _Header:
    """A cursor over the header."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def read(self, path: Path) -> GGUFFile:
        if self._data[:4] != _MAGIC:
            raise ValueError("no GGUF magic")
        self._at = 4
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}")
        tensor_count, pair_count = self._count(), self._count()
        metadata = {self._string(): self._value(self._scalar("I")) for _ in range(pair_count)}
        records = [self._tensor() for _ in range(tensor_count)]
        alignment = int(metadata.get("general.alignment", 32))
        if alignment <= 0:
            raise ValueError(f"alignment {alignment}")
        base = -(-self._at // alignment) * alignment
        tensors = {name: GGUFTensor(shape, kind, base + offset) for name, shape, kind, offset in records}
        return GGUFFile(path, metadata, tensors)

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _count(self) -> int:
        count = int(self._scalar("Q"))
        if count > _COUNT_MAX:
            raise ValueError(f"count {count} is over the limit")
        return count

    def _string(self) -> str:
        length = self._count()
        raw = self._data[self._at : self._at + length]
        if len(raw) < length:
            raise ValueError("cut off in a string")
        self._at += length
        return raw.decode()

    def _strings(self, count: int) -> list[str]:
        """As so many calls of :meth:`_string`: a vocabulary is most of what a header takes to read."""
        data, at, length_at = self._data, self._at, struct.Struct("<Q").unpack_from
        strings: list[str] = []
        for _ in range(count):
            start = at + 8
            at = start + length_at(data, at)[0]
            strings.append(data[start:at].decode())
        if at > len(data):
            raise ValueError("cut off in a string")
        self._at = at
        return strings

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        item, count = self._scalar("I"), self._count()
        if item == _STRING:
            return self._strings(count)
        if item == _ARRAY:
            return [self._value(item) for _ in range(count)]
        code = f"<{count}{_SCALARS[item]}"
        values = list(struct.unpack_from(code, self._data, self._at))
        self._at += struct.calcsize(code)
        return values

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        shape = tuple(self._scalar("Q") for _ in range(self._scalar("I")))
        return name, shape, self._scalar("I"), self._scalar("Q")
