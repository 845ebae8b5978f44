"""What a client allows a trace to cost, and by when it must have ended, as its calls say. Pure."""

import math
from collections.abc import Mapping
from typing import Any

from router.calls.errors import invalid
from router.policy.prices import Limits

BUDGET_MAX = 1e12
DEADLINE_S_MAX = 365 * 86_400.0


def allowed(headers: Mapping[str, str], metadata: Mapping[str, Any] | None) -> Limits:
    """``X-Trace-Budget`` and ``X-Trace-Deadline-S``, or else ``trace_budget`` and ``trace_deadline_s`` of the body's
    metadata.

    Args:
        headers: looked up by lower-case name.
        metadata: whatever there is in the body.

    Raises:
        CallFailed: one of them holds no such value.
    """
    said = metadata or {}
    budget = _number("x-trace-budget", headers, "trace_budget", said, BUDGET_MAX)
    deadline_s = _number("x-trace-deadline-s", headers, "trace_deadline_s", said, DEADLINE_S_MAX)
    return Limits(budget, deadline_s)


def _number(header: str, headers: Mapping[str, str], field: str, said: Mapping[str, Any], most: float) -> float | None:
    name, value = header, headers.get(header)
    if value is None:
        name, value = f"metadata.{field}", said.get(field)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0.0 < number <= most:  # nor is NaN
        raise invalid(f"{name} must be a number above 0 and up to {most:g}", name, "invalid_value")
    return number
