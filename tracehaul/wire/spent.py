"""What was spent on steps: what workers meter, and bills are made of."""

from typing import NamedTuple

import msgspec

from tracehaul.wire.ids import StepId, TraceId


class Spent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Sums. A worker's seconds are of its iterations, shared among the sequences that each of them served."""

    prefill_s: float = 0.0
    """Computing prompts."""
    recompute_s: float = 0.0
    """Computing again what was computed before, and is lost or was given up."""
    decode_s: float = 0.0
    """Computing output."""
    moved_bytes: int = 0
    """Of KV, between this worker and stores, in either direction."""
    resident_byte_s: float = 0.0
    """KV that lay on a worker while no step computed on it."""
    memory_byte_s: float = 0.0
    """KV that lay in stores' memory."""
    disk_byte_s: float = 0.0
    """KV that lay below that."""

    @property
    def worker_s(self) -> float:
        """A worker's time, whatever it was for."""
        return self.prefill_s + self.recompute_s + self.decode_s

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.prefill_s + other.prefill_s,
            self.recompute_s + other.recompute_s,
            self.decode_s + other.decode_s,
            self.moved_bytes + other.moved_bytes,
            self.resident_byte_s + other.resident_byte_s,
            self.memory_byte_s + other.memory_byte_s,
            self.disk_byte_s + other.disk_byte_s,
        )

    def since(self, before: "Spent") -> "Spent":
        """What is in this and not in ``before``; nothing, if that is later: sums never shrink, so what comes late says
        nothing new. A part may be negative: of a prompt's time it may be known afterwards what of it was recompute."""
        if not self.is_later(before):
            return NOTHING
        return Spent(
            self.prefill_s - before.prefill_s,
            self.recompute_s - before.recompute_s,
            self.decode_s - before.decode_s,
            self.moved_bytes - before.moved_bytes,
            self.resident_byte_s - before.resident_byte_s,
            self.memory_byte_s - before.memory_byte_s,
            self.disk_byte_s - before.disk_byte_s,
        )

    def is_later(self, other: "Spent") -> bool:
        """Of two sums of one account, whether this is the one that was read later."""
        return self._order > other._order

    @property
    def _order(self) -> tuple[float, ...]:
        return self.worker_s, self.moved_bytes, self.resident_byte_s, self.memory_byte_s, self.disk_byte_s


NOTHING = Spent()


class Reading(NamedTuple):
    """What an account of a worker shows: each runs for one attempt at a step, or for one trace between its steps."""

    account: int = 0
    """Its number, within the worker's life; 0: there is none."""
    spent: Spent = NOTHING
    """Up to now."""


class Charge(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """For whom an account runs, and what it shows."""

    salt: str
    trace: TraceId
    step: StepId
    """Empty: for the trace, between its steps."""
    reading: Reading
    tenant: str = ""
    """Whom it counts for; empty: nobody is named, or the worker is of an earlier version, which does not tell this nor
    what follows."""
    total: Reading = Reading()
    """What all steps of the trace have taken of the worker, in an account of the trace's own, as long as that is open;
    of what rests there is none but ``reading``. All totals of one heartbeat add up to its worker's busy time."""
    began_s: float = 0.0
    """When that account was opened, by the worker's own clock: as :attr:`tracehaul.wire.cluster.NodeLoad.up_s`."""

    @property
    def sum(self) -> Reading:
        """What bills are written by: whoever hears it late misses nothing by that."""
        return self.total if self.total.account else self.reading


class Allowance(NamedTuple):
    """What a step may spend, in money: whoever computes for it stops after the iteration that reaches it."""

    amount: float
    """Left for the step when it was sent."""
    prefill_price_s: float
    """Of a second of the prefill worker that it was given."""
    decode_price_s: float
    """Of a second of its decode worker."""
