"""The router's decisions as JSON lines, beside its log: for what happened longer ago than the router remembers."""

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

import msgspec

from router.traces.decisions import Decision, Entry
from tracehaul.runtime.clock import wall_s
from tracehaul.wire.ids import TraceId

FILE_BYTES_MAX = 16 * 2**20
"""Of one file; the one before it is kept."""


class Line(msgspec.Struct, frozen=True):
    """One decision."""

    at_s: float
    """Unix time."""
    trace: TraceId
    decision: Decision


class DecisionFile:
    """Appends to ``path``, bounded in size."""

    def __init__(self, path: Path) -> None:
        self._handler = RotatingFileHandler(path, maxBytes=FILE_BYTES_MAX, backupCount=1, encoding="utf-8")
        self._encode = msgspec.json.Encoder().encode

    def write(self, trace: TraceId, entry: Entry) -> None:
        """Append one; a disk that refuses costs the line."""
        line = self._encode(Line(wall_s(), trace, entry.decision)).decode()
        self._handler.handle(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        """The file is complete."""
        self._handler.close()
