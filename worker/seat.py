"""What serves steps, whatever computes them: our own engine, or a stock server of another one.

A decode seat serves :class:`tracehaul.wire.steps.DecodeStep`, a prefill seat :class:`tracehaul.wire.steps.PrefillStep`,
each as a stream of the wire's messages with one terminal message, and says in :attr:`Seat.info` what it lacks. Nothing
stands between a seat's service and the network: a token goes straight from the one to the other. All implementations
pass ``tests/contract/test_seat.py``.
"""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

import msgspec

from tracehaul.rpc.base import Service
from tracehaul.rpc.member import Member
from tracehaul.wire.cluster import Members, NodeInfo, NodeLoad
from tracehaul.wire.spent import Charge


class Seat(Protocol):
    """One worker's place in the fleet. Nothing of it runs before :attr:`background` does."""

    @property
    def info(self) -> NodeInfo:
        """What it announces: model, KV layout, limits, features, and rates as they are now."""
        ...

    @property
    def service(self) -> Service:
        """Serves the steps of its role. Closing a stream ends its step, wherever it is computed, within a second."""
        ...

    @property
    def background(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        """Runs for as long as it serves; its failure is the worker's."""
        ...

    @property
    def stats(self) -> Mapping[str, msgspec.Struct]:
        """Counts of its life, by the part of it that counts."""
        ...

    def load(self) -> NodeLoad:
        """What is so now, and whether it can serve."""
        ...

    def history(self) -> tuple[Charge, ...]:
        """What a router should know of whom it worked for that was not there, or was killed: its load says of that
        what has changed of late."""
        ...

    def set_members(self, members: Members) -> None:
        """Membership changed."""
        ...

    async def served(self) -> None:
        """Wait until it can serve for the first time."""
        ...

    async def news(self) -> None:
        """Wait until its load says something that no router should hear late."""
        ...

    async def aclose(self) -> None:
        """Give back what it holds elsewhere; what it was given stays whose it was."""
        ...


def member_of(seat: Seat) -> Member:
    """What a seat brings into the fleet, with its rates as they are now: so after they were measured."""
    return Member(
        seat.info,
        seat.service,
        seat.load,
        seat.set_members,
        seat.background,
        seat.stats,
        served=seat.served,
        news=seat.news,
        history=seat.history,
    )
