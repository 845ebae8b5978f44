"""Whether a line that failed is asked again, and when. Pure."""

import msgspec

FAULTS_MAX = 4
"""A line that broke something so often is poison: it is not asked again."""
BUSY = frozenset({409, 425, 429, 503})
"""Statuses that say: not now. The line is not to blame, so that only the deadline ends asking."""
FAULTS = frozenset({408, 500, 502, 504})
"""Statuses that the line may be to blame for."""
NEVER = frozenset({"insufficient_quota", "model_not_found", "context_length_exceeded"})
"""Codes of errors that stay, whatever their status."""
PAUSE_S = 0.5
PAUSE_S_MAX = 60.0


class Answer(msgspec.Struct, frozen=True):
    """What a call was answered."""

    status: int
    body: bytes
    request_id: str = ""
    retry_after_s: float | None = None
    should_retry: bool | None = None
    """What the answer says of that itself, if anything."""

    @property
    def ok(self) -> bool:
        """It is one."""
        return 200 <= self.status < 300


class NoAnswer(msgspec.Struct, frozen=True):
    """There was none."""

    why: str
    reached: bool = True
    """Somebody may have begun to answer; else the line is not to blame."""


class Tried(msgspec.Struct):
    """How often a line was asked in vain."""

    busy: int = 0
    faults: int = 0


def again_in_s(said: Answer | NoAnswer, tried: Tried, left_s: float, jitter: float) -> float | None:
    """In how many seconds to ask again; None: never.

    Args:
        said: what came, which is no good answer.
        tried: counted here.
        left_s: until the deadline. What could be asked only after it is not asked.
        jitter: from 0 to 1, so that not all come at once.
    """
    after_s = 0.0
    match said:
        case NoAnswer(reached=reached):
            fault = reached
        case Answer():
            if said.should_retry is False or _code(said.body) in NEVER:
                return None
            if said.status not in BUSY | FAULTS and not said.should_retry:
                return None
            fault = said.status not in BUSY
            after_s = said.retry_after_s or 0.0
    if fault:
        tried.faults += 1
        if tried.faults >= FAULTS_MAX:
            return None
    else:
        tried.busy += 1
    pause_s = min(PAUSE_S_MAX, PAUSE_S * 2.0 ** min(tried.busy + tried.faults - 1, 10))
    pause_s = max(after_s, pause_s * (0.5 + jitter / 2))
    return pause_s if pause_s < left_s else None


class _Told(msgspec.Struct):
    code: str | int | None = None


class _Body(msgspec.Struct):
    error: _Told


def _code(body: bytes) -> str | int | None:
    try:
        return msgspec.json.decode(body, type=_Body).error.code
    except (msgspec.DecodeError, UnicodeError):
        return None
