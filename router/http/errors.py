"""One decided status for each cause of a failure. Pure."""

from router.calls.errors import CallFailed, Cause

RETRY_AFTER_S = 1

STATUS: dict[Cause, int] = {
    "invalid": 400,
    "not_found": 404,
    "too_slow": 408,
    "conflict": 409,
    "too_large": 413,
    "failed": 500,
    "unavailable": 503,
    "late": 504,
}


def headers_of(failure: CallFailed) -> dict[str, str]:
    """What an answer with that error says beside its body."""
    match failure.cause:
        case "unavailable":
            return {"retry-after": str(RETRY_AFTER_S)}
        case "too_slow":
            return {"connection": "close"}  # the rest of the body may come for ever
        case _:
            return {}
