"""One decided status for each cause of a failure. Pure."""

import math

from router.calls.errors import CallFailed, Cause

RETRY_AFTER_S = 1

STATUS: dict[Cause, int] = {
    "invalid": 400,
    "unauthorized": 401,
    "spent": 402,
    "forbidden": 403,
    "not_found": 404,
    "too_slow": 408,
    "conflict": 409,
    "too_large": 413,
    "unsupported_media": 415,
    "mismatched": 422,
    "limited": 429,
    "failed": 500,
    "unavailable": 503,
    "late": 504,
}


def headers_of(failure: CallFailed) -> dict[str, str]:
    """What an answer with that error says beside its body."""
    match failure.cause:
        case "unavailable" | "limited":
            after_s = RETRY_AFTER_S if failure.retry_after_s is None else max(1, math.ceil(failure.retry_after_s))
            begins = {} if failure.begins_s is None else {"x-begins-in-s": f"{failure.begins_s:.0f}"}
            return {"retry-after": str(after_s), **begins}
        case "unauthorized":
            return {"www-authenticate": "Bearer"}
        case "too_slow":
            return {"connection": "close"}  # the rest of the body may come for ever
        case _:
            return {}
