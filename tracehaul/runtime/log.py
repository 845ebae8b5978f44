"""Logs of one line per event: ``time level node logger event key=value …``, over the standard library."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

from tracehaul.runtime import clock

_FIELDS = "tracehaul_fields"
_SELDOM_KEYS_MAX = 1024
_OURS = ("engines", "kvstore", "tracehaul")
"""Packages that may run in another program's process."""
_VALUE_CHARS_MAX = 4000
"""A longer value is cut: a log line is not a data path."""


class Log:
    """Logger of one module: an event in plain words, and its facts as keyword arguments."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: object) -> None:
        """For someone who follows one call through the code."""
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Normal, and worth a line in production."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """The world misbehaved and we coped."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, *, error: BaseException | None = None, **fields: object) -> None:
        """A bug, or a loss that somebody has to look at; with ``error``, its traceback on the same line."""
        self._write(logging.ERROR, event, fields, error)

    def _write(self, level: int, event: str, fields: dict[str, object], error: BaseException | None = None) -> None:
        if self._logger.isEnabledFor(level):
            trace = (type(error), error, error.__traceback__) if error is not None else None
            self._logger.log(level, event, extra={_FIELDS: fields}, exc_info=trace)


class Seldom:
    """Says what may happen often: each event at most once in ``every_s``, the next time with how often it was not said.

    ``about`` tells apart what is limited on its own, such as one node's failures from another's.
    """

    def __init__(self, log: Log, every_s: float = 10.0) -> None:
        self._log = log
        self._every_s = every_s
        self._said: dict[tuple[str, str], tuple[float, int]] = {}  # when, and how often not since

    def warning(self, event: str, about: str = "", **fields: object) -> None:
        """As :meth:`Log.warning`, if it was not said lately."""
        now_s = clock.perf_s()
        key = event, about
        said_s, unsaid = self._said.get(key, (-self._every_s, 0))
        if now_s - said_s < self._every_s:
            self._said[key] = said_s, unsaid + 1
            return
        if len(self._said) >= _SELDOM_KEYS_MAX:
            self._said.clear()
        self._said[key] = now_s, 0
        if unsaid:
            fields["unsaid"] = unsaid
        self._log.warning(event, **fields)


class LineFormatter(logging.Formatter):
    """Formats any record, ours or a library's, as one line with the node's name in it."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        parts = [when, record.levelname.lower(), self._node, record.name, _value(record.getMessage())]
        fields: dict[str, object] = getattr(record, _FIELDS, {})
        parts += [f"{key}={_value(value)}" for key, value in fields.items()]
        if record.exc_info is not None and record.exc_info[0] is not None:
            parts.append(f"exception={_value(self.formatException(record.exc_info))}")
        return " ".join(parts)


def _value(value: object) -> str:
    """``value`` as one token: quoted where it has blanks, quotes, ``=`` or what is not printable."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if len(text) > _VALUE_CHARS_MAX:
        text = text[:_VALUE_CHARS_MAX] + "…"
    if text and text.isprintable() and not any(char in text for char in ' "='):
        return text
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else json.dumps(text)


def setup(node: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Send all logs of this process to ``stream`` (default: standard error), each line with ``node`` in it.

    Calling again replaces the earlier setup.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(LineFormatter(node))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for each request


def setup_beside(node: str) -> None:
    """Send our own lines to standard error, each with ``node`` in it, in a process whose logs are another program's.

    That program would leave them out, or their facts. Nothing is changed where :func:`setup` was called, or where
    somebody else has handlers that are no plain streams.
    """
    handlers = logging.getLogger().handlers
    theirs = [
        one for one in handlers if type(one) is logging.StreamHandler and not isinstance(one.formatter, LineFormatter)
    ]
    if handlers and not theirs:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(node))
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO)
