"""How soon a call's steps should run and by when they must have ended, as its headers say. Pure."""

import math
from collections.abc import Mapping
from typing import get_args

import msgspec

from router.calls.errors import invalid
from tracehaul.wire.steps import StepClass

DEADLINE_S_MAX = 7 * 86_400.0
PRIORITY_MAX = 1_000_000


class Urgency(msgspec.Struct, frozen=True):
    """As in :class:`router.dispatch.steps.StepRequest`."""

    step_class: StepClass = "standard"
    priority: int = 0
    deadline_s: float | None = None


def urgency(headers: Mapping[str, str], now_s: float, priority: int | None = None, *, flex: bool = False) -> Urgency:
    """``X-Step-Class``, ``X-Priority`` and ``X-Deadline-S``: seconds that the call may take from now on.

    Args:
        headers: looked up by lower-case name.
        now_s: of the clock that the deadline is to be of.
        priority: the body's, which counts where no header tells one.
        flex: the body says that it is background work, whatever a header says.

    Raises:
        CallFailed: one of them holds no such value.
    """
    deadline_in_s = _deadline_in_s(headers.get("x-deadline-s"))
    return Urgency(
        step_class="background" if flex else _step_class(headers.get("x-step-class")),
        priority=_priority(headers.get("x-priority"), priority or 0),
        deadline_s=None if deadline_in_s is None else now_s + deadline_in_s,
    )


def _step_class(value: str | None) -> StepClass:
    classes: tuple[StepClass, ...] = get_args(StepClass)
    if value is None:
        return "standard"
    for known in classes:
        if value.strip().lower() == known:
            return known
    raise invalid(f"x-step-class must be one of {', '.join(classes)}", "x-step-class", "invalid_value")


def _priority(value: str | None, default: int) -> int:
    if value is None:
        return default
    try:
        priority = int(value[:16])
    except ValueError:
        priority = PRIORITY_MAX + 1
    if abs(priority) > PRIORITY_MAX:
        message = f"x-priority must be an integer from -{PRIORITY_MAX} to {PRIORITY_MAX}; higher goes first"
        raise invalid(message, "x-priority", "invalid_value")
    return priority


def _deadline_in_s(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds <= DEADLINE_S_MAX:  # nor is NaN
        message = f"x-deadline-s must be a number of seconds above 0 and up to {DEADLINE_S_MAX:.0f}"
        raise invalid(message, "x-deadline-s", "invalid_value")
    return seconds
