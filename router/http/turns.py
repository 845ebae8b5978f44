"""Calls of the background wait for their turn in the queue of all that nobody waits for."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from jobs.runner import NoTurn, Runner
from router.calls.errors import CallFailed, unavailable
from router.calls.urgency import Urgency
from router.http.config import ApiConfig
from tracehaul.runtime import clock
from tracehaul.wire.steps import StepClass

LATER_S = 3600.0
"""Responses in the background have begun by then."""
AGAIN_S = 30.0
"""Whom no turn came is told to ask again after that long."""


class Turns:
    """At one router."""

    def __init__(self, runner: Runner, config: ApiConfig) -> None:
        self.runner = runner
        self._wait_s = config.flex_wait_s
        self._waiting_max = config.requests_max // 2

    @asynccontextmanager
    async def turn(self, urgency: Urgency) -> AsyncGenerator[None, None]:
        """One call's, if it is of the background; any other has its turn at once.

        Raises:
            CallFailed: the fleet has had no room for it.
        """
        if urgency.step_class != "background":
            yield
            return
        if self.runner.waiting >= self._waiting_max:
            raise _refused(f"{self.runner.waiting} calls wait for some already")
        ends_s = clock.now_s() + self._wait_s
        ends_s = ends_s if urgency.deadline_s is None else min(ends_s, urgency.deadline_s)
        try:
            async with self.runner.turn(ends_s):
                yield
        except NoTurn:
            raise _refused(f"none came within {self._wait_s:g} s") from None

    @asynccontextmanager
    async def later(self) -> AsyncGenerator[StepClass, None]:
        """One that comes within :data:`LATER_S` whatever else runs, and that nobody waits for; says how its steps
        run then.

        Raises:
            CallFailed: the fleet has not been there.
        """
        try:
            async with self.runner.turn(clock.now_s() + LATER_S, presses=True) as urgent:
                yield "standard" if urgent else "background"
        except NoTurn:
            raise unavailable(f"no worker had room for it within {LATER_S:g} s", "overloaded") from None


def _refused(why: str) -> CallFailed:
    message = (
        f"There is no idle capacity for background work (service_tier flex) now: {why}. "
        "Ask again later, or with service_tier auto."
    )
    return CallFailed("limited", message, code="resource_unavailable", retry_after_s=AGAIN_S)
