"""From a body to a call, without what spoils it, and what the client is told of that. Pure."""

from typing import TypeVar

from router.calls.call import Call
from router.calls.errors import CallFailed
from router.calls.mending import mended
from router.calls.noise import without_noise
from router.dialects.base import Dialect, Models, Teller
from router.dialects.body import INVALID_JSON

T = TypeVar("T", bound=Teller)

WARNING = b"x-tracehaul-warning"
"""One header for each thing of a body that was not taken as it is."""


def read(dialect: Dialect[T], body: bytes, fresh: str, created: int, models: Models) -> tuple[Call, T, list[str]]:
    """As :meth:`router.dialects.base.Dialect.read`, and with warnings.

    Raises:
        CallFailed: likewise.
    """
    warnings: list[str] = []
    try:
        call, teller = dialect.read(body, fresh, created, models)
    except CallFailed as failure:
        better = mended(body) if failure.code == INVALID_JSON else None
        if better is None:
            raise
        warnings.append("halves of surrogate pairs were read as U+FFFD")
        call, teller = dialect.read(better, fresh, created, models)
    call, dropped = without_noise(call)
    return call, teller, [*warnings, *(f"{what} was left out" for what in dropped)]
