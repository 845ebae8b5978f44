"""What it costs: prices, bills made by them, and what a trace may still cost. Pure.

A bill is quantities times prices, line by line (see ``docs/bills.md``). Workers' time is the line that adds up to what
the fleet costs: all of a worker's seconds are some trace's, or idle, or were lost with it.
"""

from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from tracehaul.wire.ids import NodeId
from tracehaul.wire.spent import Spent

HOUR_S = 3600.0
GIB = float(2**30)

Price = Annotated[float, Meta(ge=0)]


class Tariff(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prices, all in one unit. As they are here a bill counts workers' seconds."""

    unit: Annotated[str, Meta(min_length=1, max_length=32)] = "worker seconds"
    worker_hour: Price = HOUR_S
    """Of a worker on a host whose kind has no price of its own."""
    resident_gib_hour: Price = 0.0
    """Contexts that lie on workers between steps."""
    memory_gib_hour: Price = 0.0
    """In stores' memory."""
    disk_gib_hour: Price = 0.0
    """Below that."""
    moved_gib: Price = 0.0
    """KV between workers and stores."""


class Bill(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What something has taken, and what that costs."""

    spent: Spent = Spent()
    worker_amount: float = 0.0
    """For workers' time."""
    amount: float = 0.0
    """For everything."""

    def __add__(self, other: "Bill") -> "Bill":
        return Bill(self.spent + other.spent, self.worker_amount + other.worker_amount, self.amount + other.amount)

    def within(self, left: float) -> "Bill":
        """The same where only so much is left of a budget: beyond that nothing is paid but workers' time, which whoever
        computes has kept to it."""
        return Bill(self.spent, self.worker_amount, max(self.worker_amount, min(self.amount, left)))


FREE = Bill()


class Prices:
    """A tariff, and what an hour of each worker costs that has a price of its own."""

    def __init__(self, tariff: Tariff, worker_hours: Mapping[NodeId, float] | None = None) -> None:
        self.tariff = tariff
        self._hours = dict(worker_hours or {})

    def second(self, node: NodeId | None) -> float:
        """Of that worker."""
        hour = self.tariff.worker_hour
        return (hour if node is None else self._hours.get(node, hour)) / HOUR_S

    def bill(self, node: NodeId | None, spent: Spent) -> Bill:
        """For what that node has done, or None: for what no worker has."""
        tariff, worker_amount = self.tariff, spent.worker_s * self.second(node)
        kept = (
            spent.resident_byte_s * tariff.resident_gib_hour
            + spent.memory_byte_s * tariff.memory_gib_hour
            + spent.disk_byte_s * tariff.disk_gib_hour
        )
        moved = spent.moved_bytes * tariff.moved_gib
        return Bill(spent, worker_amount, worker_amount + kept / GIB / HOUR_S + moved / GIB)


class Limits(msgspec.Struct, frozen=True, gc=False):
    """What a client allows a trace. None: it does not say."""

    budget: float | None = None
    """In the tariff's unit, for all of the trace."""
    deadline_s: float | None = None
    """Seconds from the trace's beginning."""

    def after(self, before: "Limits") -> "Limits":
        """What counts where an earlier step has said ``before``."""
        return Limits(
            before.budget if self.budget is None else self.budget,
            before.deadline_s if self.deadline_s is None else self.deadline_s,
        )


UNLIMITED = Limits()


def share(left: float, choices: int) -> float:
    """What the first of so many steps that begin together may take of what is left, so that each has as much."""
    return max(0.0, left) / max(1, choices)
