"""Deadlines of steps.

Inside a process a deadline is a time of its own clock (``deadline_s``). Between processes what is left of it travels
(``deadline_in_s``), and who receives it starts its own clock: monotonic clocks of two hosts have nothing in common, and
wall clocks are set and drift apart. The message's way is not counted, so a deadline passes a little later the further
down it went, and who asked is the first to know.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from tracehaul.runtime import clock
from tracehaul.wire.errors import DeadlineExceeded


def deadline_at(in_s: float | None) -> float | None:
    """The deadline that is so far from now; None is none."""
    return None if in_s is None else clock.now_s() + in_s


def left_s(deadline_s: float | None) -> float | None:
    """What is left until a deadline, to be sent on; None if there is none."""
    return None if deadline_s is None else max(0.0, deadline_s - clock.now_s())


def sooner(one_s: float | None, other_s: float | None) -> float | None:
    """The deadline that comes first; None is none."""
    return min((at_s for at_s in (one_s, other_s) if at_s is not None), default=None)


def exceeded() -> DeadlineExceeded:
    """What ends a step at its deadline."""
    return DeadlineExceeded("the step's deadline has passed")


def check(deadline_s: float | None) -> None:
    """Raises DeadlineExceeded if it has passed."""
    if deadline_s is not None and deadline_s <= clock.now_s():
        raise exceeded()


@asynccontextmanager
async def until(deadline_s: float | None) -> AsyncGenerator[None]:
    """Waits inside end at the deadline. Not for generators that yield inside: their caller would be interrupted.

    Raises:
        DeadlineExceeded: it has passed, before or meanwhile.
    """
    check(deadline_s)
    timeout = asyncio.timeout_at(deadline_s)
    try:
        async with timeout:
            yield
    except TimeoutError:
        if timeout.expired():
            raise exceeded() from None
        raise
