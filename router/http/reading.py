"""From a body to a call, without what spoils it, and what the client is told of that. Pure."""

from collections.abc import Callable
from typing import TypeVar

from router.calls.call import Call
from router.calls.errors import CallFailed
from router.calls.mending import mended
from router.calls.noise import without_noise
from router.dialects.base import Dialect, Models, Teller
from router.dialects.body import INVALID_JSON

T = TypeVar("T", bound=Teller)
R = TypeVar("R")

WARNING = b"x-tracehaul-warning"
"""One header for each thing of a body that was not taken as it is."""


def read(dialect: Dialect[T], body: bytes, fresh: str, created: int, models: Models) -> tuple[Call, T, list[str]]:
    """As :meth:`router.dialects.base.Dialect.read`, and with warnings.

    Raises:
        CallFailed: likewise.
    """
    (call, teller), warnings = mending(body, lambda data: dialect.read(data, fresh, created, models))
    call, dropped = quiet(call)
    return call, teller, [*warnings, *dropped]


def mending(body: bytes, take: Callable[[bytes], R]) -> tuple[R, list[str]]:
    """What ``take`` makes of a body, mended where it needs to be, and with warnings. Raises CallFailed as it does."""
    try:
        return take(body), []
    except CallFailed as failure:
        better = mended(body) if failure.code == INVALID_JSON else None
        if better is None:
            raise
        return take(better), ["halves of surrogate pairs were read as U+FFFD"]


def quiet(call: Call) -> tuple[Call, list[str]]:
    """The call without noise, and with warnings."""
    call, dropped = without_noise(call)
    return call, [f"{what} was left out" for what in dropped]
