"""The bytes of what traces were answered: one record after the other in one file.

Each has its length and its checksum before it, so what a killed process left half written is told from what was
damaged. What is dropped is overwritten where it stands.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from router.traces.kept import Kept, Whose, kept
from router.traces.texts import Said
from router.traces.trace import TraceKey
from tracehaul.runtime.log import Log
from tracehaul.wire.hashing import checksum

log = Log(__name__)

_MAGIC = b"tracehaul answers 1\n"
_FRAME = struct.Struct("<IQ")
"""Length and checksum of what follows; 0: it was dropped."""
_PIECE_BYTES = 1 << 20

_decode = msgspec.msgpack.Decoder(Kept).decode
_decode_whose = msgspec.msgpack.Decoder(Whose).decode


class Damaged(Exception):
    """The file is not what was written."""


class Row(msgspec.Struct, gc=False):
    """One answer, by where it is in the file."""

    at: int = 0
    size: int = 0
    """0: it is not there yet, or not any more."""
    gone: bool = False
    """It is to be dropped."""


class New(NamedTuple):
    """What is to be written."""

    row: Row
    key: TraceKey
    said: Said
    heard: str | None


class AnswerBytes:
    """The bytes. Blocking; one call at a time. Everything raises OSError where the disk does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(self._fd, 0o600)
        self.size = os.fstat(self._fd).st_size

    def load(self) -> list[tuple[Whose, Row]]:
        """All that is in it. What a killed process left half written at the end is cut off.

        Raises:
            Damaged: it is not what was written.
        """
        found: list[tuple[Whose, Row]] = []
        end, at = self.size, len(_MAGIC)
        with open(self._fd, "rb", buffering=_PIECE_BYTES, closefd=False) as file:
            begins = file.read(at)
            if begins != _MAGIC[: len(begins)]:
                raise Damaged("it begins with something else")
            while at < end:
                header = file.read(_FRAME.size)
                length, summed = _FRAME.unpack(header) if len(header) == _FRAME.size else (end, 0)
                after = at + _FRAME.size + length
                body = file.read(length) if after <= end else b""
                if after > end or (after == end and summed and checksum(body) != summed):
                    log.info("the last answer that was kept is torn", bytes=end - at)
                    break
                if summed:
                    found.append((_whose(body, summed), Row(at, _FRAME.size + length)))
                at = after
        if at > end:
            os.pwrite(self._fd, _MAGIC, 0)
        os.ftruncate(self._fd, at)
        self.size = at
        return found

    def drop(self, rows: Sequence[Row]) -> None:
        """Overwrite these."""
        for row in rows:
            if row.size:
                os.pwrite(self._fd, _FRAME.pack(row.size - _FRAME.size, 0) + bytes(row.size - _FRAME.size), row.at)
                row.size = 0

    def append(self, new: Sequence[New]) -> None:
        """Add what is not to go already."""
        frames = [(one.row, frame) for one in new if not one.row.gone and (frame := _frame(one)) is not None]
        if not frames:
            return
        data = b"".join(frame for _, frame in frames)
        try:
            put = os.pwrite(self._fd, data, self.size)
            if put != len(data):
                raise OSError(f"no room for {len(data)} bytes")
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._fd, self.size)
            raise
        for row, frame in frames:
            row.at, row.size = self.size, len(frame)
            self.size += len(frame)

    def read(self, rows: Sequence[Row]) -> list[Kept]:
        """Those that can be read."""
        found: list[Kept] = []
        for row in rows:
            data = os.pread(self._fd, row.size, row.at) if row.size else b""
            if len(data) > _FRAME.size and checksum(data[_FRAME.size :]) == _FRAME.unpack_from(data)[1]:
                found.append(_decode(data[_FRAME.size :]))
        return found

    def rewrite(self, rows: Sequence[Row]) -> Iterator[None]:
        """Hold these and nothing else: as a whole, or not at all. In turns."""
        fresh = self._path.with_name(self._path.name + ".new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            places: list[int] = []
            size = os.pwrite(fd, _MAGIC, 0)
            piece = bytearray()
            for row in (rows := sorted((row for row in rows if row.size), key=lambda row: row.at)):
                places.append(size + len(piece))
                piece += os.pread(self._fd, row.size, row.at)
                if len(piece) >= _PIECE_BYTES:
                    size += _put(fd, piece, size)
                    yield
            size += _put(fd, piece, size)
            os.fsync(fd)
            fresh.replace(self._path)
        except OSError:
            os.close(fd)
            with suppress(OSError):
                fresh.unlink()
            raise
        os.close(self._fd)
        self._fd, self.size = fd, size
        for row, at in zip(rows, places, strict=True):
            row.at = at

    def close(self) -> None:
        """Give it up."""
        os.close(self._fd)


def _whose(body: bytes, summed: int) -> Whose:
    if checksum(body) != summed:
        raise Damaged("a checksum is wrong")
    try:
        return _decode_whose(body)
    except msgspec.DecodeError as error:
        raise Damaged(str(error)) from None


def _frame(new: New) -> bytes | None:
    """None: it has half a surrogate pair, which nothing keeps."""
    try:
        body = msgspec.msgpack.encode(kept(new.key, new.said, new.heard))
    except UnicodeEncodeError:
        return None
    return _FRAME.pack(len(body), checksum(body)) + body


def _put(fd: int, piece: bytearray, at: int) -> int:
    """Write all of it; returns its length, and empties it."""
    put, size = os.pwrite(fd, piece, at), len(piece)
    if put != size:
        raise OSError(f"no room for {size} bytes")
    piece.clear()
    return size
