"""When something is told, told again, and given up. Pure."""

import random

import msgspec

RETRIES_S = (5.0, 60.0, 300.0, 1800.0, 7200.0, 18_000.0, 28_800.0, 28_800.0)
"""Between the first attempt and the second, and so on: 23.6 hours in all."""
SPREAD = 0.1
"""What waits is spread by so much, up or down."""
RETRY_AFTER_S_MAX = 3600.0
"""What a receiver may ask for."""
BREAK_AFTER = 10
"""Attempts in a row that failed: then nobody is told there, but for one attempt from time to time."""
PROBES_S = (60.0, 300.0, 900.0, 1800.0)
"""Between these; the last one again and again."""


class Delivered(msgspec.Struct, frozen=True):
    """It was taken."""


class Failed(msgspec.Struct, frozen=True):
    """It was not, or nobody knows."""

    why: str
    retry_after_s: float = 0.0
    """Not before."""
    gone: bool = False
    """The receiver wants no more of these, ever."""


Outcome = Delivered | Failed


class Delivery(msgspec.Struct, frozen=True):
    """One event on its way to one address. Times are Unix seconds."""

    event: str
    """Its name."""
    body: str
    since_s: float
    due_s: float
    attempts: int = 0
    """That failed."""


def retried(delivery: Delivery, failed: Failed, now_s: float, dice: random.Random) -> Delivery | None:
    """What becomes of it after a failed attempt; None: it is given up."""
    if failed.gone or delivery.attempts >= len(RETRIES_S):
        return None
    wait_s = RETRIES_S[delivery.attempts] * dice.uniform(1 - SPREAD, 1 + SPREAD)
    wait_s = max(wait_s, min(failed.retry_after_s, RETRY_AFTER_S_MAX))
    return msgspec.structs.replace(delivery, attempts=delivery.attempts + 1, due_s=now_s + wait_s)


def sooner(delivery: Delivery, now_s: float) -> Delivery:
    """The same, not later than it could be by now: the clock may have been put back."""
    latest_s = now_s + max(*RETRIES_S, RETRY_AFTER_S_MAX) * (1 + SPREAD)
    return msgspec.structs.replace(delivery, due_s=min(delivery.due_s, latest_s))


class Breaker:
    """Of one address. Times are of any one clock."""

    def __init__(self) -> None:
        self._failures = 0
        self._probes = 0
        self._until_s: float | None = None
        """When the next attempt may be; None: it is closed."""
        self.gone = False
        """The receiver wants nothing any more."""

    @property
    def open(self) -> bool:
        """Nobody is told there, but for attempts from time to time."""
        return self.gone or self._until_s is not None

    def opens_s(self) -> float | None:
        """When the next attempt may be; None: at any time."""
        return float("inf") if self.gone else self._until_s

    def places(self, now_s: float, most: int) -> int:
        """How many attempts may run at once."""
        if self.gone:
            return 0
        if self._until_s is None:
            return most
        return 1 if now_s >= self._until_s else 0

    def heard(self, outcome: Outcome, now_s: float) -> None:
        """An attempt has ended so."""
        if isinstance(outcome, Delivered):
            self._failures, self._probes, self._until_s = 0, 0, None
            return
        self.gone = self.gone or outcome.gone
        self._failures += 1
        if self._failures >= BREAK_AFTER:
            self._until_s = now_s + PROBES_S[min(self._probes, len(PROBES_S) - 1)]
            self._probes += 1
