"""What goes wrong in a simulated cluster, by seed; and what each fault stands for. Pure.

========= ==================================================================================================
delay     Every frame and every copy takes a random time; in a :class:`Slow` window, much longer. Frames of one
          connection keep their order, as TCP keeps it; copies are in no order with anything.
drop      TCP loses no single frame silently: a lost packet is a delay, or the end of the connection. So a
          :class:`Cut` holds everything between two nodes back until it ends or a deadline passes, and a
          :class:`Break` ends a node's connections with what was under way on them lost: a request may have been
          carried out although its answer never came. A copy can be lost, and then its issuer is told.
duplicate A frame never arrives twice on one connection. What arrives twice is a request whose answer was lost
          with its connection and that is made again; :class:`Break` provokes that.
reorder   Across connections, and between the control plane and copies: each draws its own delay.
corrupt   A copy lands with one byte wrong (:class:`Storm`), or a byte of a published block rots in a store's
          memory (:class:`Rot`). The control plane is not corrupted: TCP's checksum and msgspec's typing are
          taken to hold.
crash     The process is gone between two instructions: no cleanup runs, connections break, its memory is
          unreachable. It comes back as a new life of its name, empty but for what its device kept:
          what the process was writing is half done, and after a :class:`PowerLoss` what was not flushed may be
          gone in any order, and after a :class:`HostLoss` all of it is.
freeze    SIGSTOP, or a machine that swaps: nothing runs there, nobody is told, and then it goes on with all its
          timers late. Copies that its memory takes part in go on, as one-sided copies do. A :class:`Zombie` was
          replaced meanwhile.
operator  Drains a node and replaces it (:class:`Retire`), or changes a worker's role (:class:`Turn`).
disk      A device is slow, full, dead for a while (:class:`DiskTrouble`), or rots (:class:`DiskRot`).
========= ==================================================================================================
"""

import random
from typing import Any, Literal

import msgspec

from tracehaul.wire.ids import NodeId

Rng = random.Random

TURNLESS_SHARE = 0.5
TURNS_BEGIN_S = 9.0
"""Before that no router knows who is there."""


class Crash(msgspec.Struct, frozen=True, tag=True):
    """``node`` dies at ``at_s`` and starts anew, empty, ``for_s`` later."""

    at_s: float
    node: NodeId
    for_s: float


class Freeze(msgspec.Struct, frozen=True, tag=True):
    """``node`` runs nothing for ``for_s``."""

    at_s: float
    node: NodeId
    for_s: float


class Cut(msgspec.Struct, frozen=True, tag=True):
    """Nothing passes between ``node`` and ``other`` for ``for_s``; what was sent arrives afterwards."""

    at_s: float
    node: NodeId
    other: NodeId
    for_s: float


class Break(msgspec.Struct, frozen=True, tag=True):
    """Every connection of ``node`` breaks; the process lives on."""

    at_s: float
    node: NodeId


class Slow(msgspec.Struct, frozen=True, tag=True):
    """Frames and copies from and to ``node`` take up to ``delay_s`` more for ``for_s``."""

    at_s: float
    node: NodeId
    delay_s: float
    for_s: float


class Storm(msgspec.Struct, frozen=True, tag=True):
    """For ``for_s``, a share of all copies is corrupted, lost, or late by up to ``late_s``."""

    at_s: float
    for_s: float
    corrupt_share: float
    lost_share: float
    late_share: float
    late_s: float


class Rot(msgspec.Struct, frozen=True, tag=True):
    """One byte of one published block changes in the memory of ``node``."""

    at_s: float
    node: NodeId


class Zombie(msgspec.Struct, frozen=True, tag=True):
    """``node`` stands still, is taken for dead and replaced on another host; ``for_s`` later it goes on."""

    at_s: float
    node: NodeId
    for_s: float


class PowerLoss(msgspec.Struct, frozen=True, tag=True):
    """As :class:`Crash`, and the device forgets some of what it had not flushed."""

    at_s: float
    node: NodeId
    for_s: float


class HostLoss(msgspec.Struct, frozen=True, tag=True):
    """As :class:`Crash`, and its device is gone, too: what comes back is another host, empty."""

    at_s: float
    node: NodeId
    for_s: float


class Retire(msgspec.Struct, frozen=True, tag=True):
    """An operator drains ``node`` for at most ``for_s``, and replaces it by an empty host if that was enough."""

    at_s: float
    node: NodeId
    for_s: float


class Turn(msgspec.Struct, frozen=True, tag=True):
    """``router`` is told to give the worker ``node`` the role that it does not have."""

    at_s: float
    node: NodeId
    router: NodeId


class DiskTrouble(msgspec.Struct, frozen=True, tag=True):
    """The device of ``node`` is slow, refuses writes, or everything, or its bucket is unreachable, for ``for_s``."""

    at_s: float
    node: NodeId
    kind: Literal["slow", "full", "dead", "unreachable"]
    for_s: float


class DiskRot(msgspec.Struct, frozen=True, tag=True):
    """One byte of one block, or of its record, changes on the device of ``node``, and one in its bucket."""

    at_s: float
    node: NodeId


Fault = (
    Crash
    | Freeze
    | Cut
    | Break
    | Slow
    | Storm
    | Rot
    | Zombie
    | PowerLoss
    | HostLoss
    | Retire
    | Turn
    | DiskTrouble
    | DiskRot
)


class FaultPlan(msgspec.Struct, frozen=True):
    """All faults of one run, in order of time; the last of them ends before ``end_s``."""

    faults: tuple[Fault, ...]
    end_s: float
    frame_delay_s: float
    """Every frame takes up to this long."""
    copy_delay_s: float
    """Every copy takes up to this long."""


class Targets(msgspec.Struct, frozen=True):
    """Whom faults can hit."""

    routers: tuple[NodeId, ...]
    stores: tuple[NodeId, ...]
    workers: tuple[NodeId, ...]

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """All of them, the routers last."""
        return self.stores + self.workers + self.routers


def make_faults(seed: int, fleet: Targets, end_s: float) -> FaultPlan:
    """The faults of a run: none at all for every tenth seed, and from mild to wild for the others."""
    rng = random.Random(f"faults {seed}")  # noqa: S311 - reproducible is the point
    if seed % 10 == 0:
        return FaultPlan(faults=(), end_s=end_s, frame_delay_s=0.0005, copy_delay_s=0.0005)
    count = rng.choice([2, 4, 8, 16, 32])
    # A run favours some kinds: what only shows when one thing happens again and again gets its chance.
    kinds = [Crash, Freeze, Cut, Break, Slow, Storm, Rot]
    weights = [rng.random() ** 2 for _ in kinds]
    faults = [_make(rng, rng.choices(kinds, weights)[0], fleet, end_s) for _ in range(count)]
    return FaultPlan(
        faults=tuple(sorted(faults, key=lambda fault: fault.at_s)),
        end_s=end_s,
        frame_delay_s=rng.choice([0.0002, 0.001, 0.01]),
        copy_delay_s=rng.choice([0.0002, 0.002, 0.05]),
    )


def make_store_faults(seed: int, fleet: Targets, end_s: float) -> list[Fault]:
    """What goes wrong at and below stores that have tiers, beside :func:`make_faults`; a generator of its own, so
    that runs without tiers stay what they were."""
    rng = random.Random(f"store faults {seed}")  # noqa: S311 - reproducible is the point
    if seed % 10 == 0:
        return []
    kinds: list[type[Any]] = [Crash, Zombie, PowerLoss, HostLoss, Retire, DiskTrouble, DiskRot]
    weights = [rng.random() ** 2 for _ in kinds]
    faults: list[Fault] = []
    for _ in range(rng.choice([1, 4, 12])):
        at_s = rng.uniform(0, end_s * 0.8)
        node, for_s = rng.choice(fleet.stores), min(end_s - at_s, rng.choice([0.05, 0.5, 2.0, 8.0]))
        kind = rng.choices(kinds, weights)[0]
        if kind is DiskRot:
            faults.append(DiskRot(at_s, node))
        elif kind is DiskTrouble:
            faults.append(DiskTrouble(at_s, node, rng.choice(("slow", "full", "dead", "unreachable")), for_s))
        else:
            faults.append(kind(at_s, node, for_s))
    return faults


def _make(rng: Rng, kind: type[Any], fleet: Targets, end_s: float) -> Fault:
    at_s = rng.uniform(0, end_s * 0.8)
    left_s = end_s - at_s
    node = rng.choice(fleet.nodes)
    for_s = min(left_s, rng.choice([0.05, 0.5, 2.0, 8.0, 20.0]))
    if kind is Crash:
        return Crash(at_s, node, for_s)
    if kind is Freeze:
        return Freeze(at_s, node, for_s)
    if kind is Cut:
        other = rng.choice([name for name in fleet.nodes if name != node])
        return Cut(at_s, node, other, for_s)
    if kind is Break:
        return Break(at_s, rng.choice(fleet.nodes))
    if kind is Slow:
        return Slow(at_s, node, rng.choice([0.02, 0.2, 2.0]), for_s)
    if kind is Rot:
        return Rot(at_s, rng.choice(fleet.stores))
    assert kind is Storm
    shares = [rng.choice([0.0, 0.02, 0.2]) for _ in range(3)]
    return Storm(at_s, for_s, *shares, late_s=rng.choice([1.0, 8.0]))


def make_turns(seed: int, fleet: Targets, end_s: float) -> list[Fault]:
    """Changes of roles, in half of all runs: one now and then, or many at once, by any router. A generator of its own,
    so that other runs stay what they were; runs without faults have some, too, as these are none."""
    rng = random.Random(f"turns {seed}")  # noqa: S311 - reproducible is the point
    if rng.random() < TURNLESS_SHARE:
        return []
    count = rng.choice([2, 6, 20])
    times_s = sorted(rng.uniform(TURNS_BEGIN_S, end_s) for _ in range(count))
    return [Turn(at_s, rng.choice(fleet.workers), rng.choice(fleet.routers)) for at_s in times_s]


class Weather:
    """The faults in force now, as the links ask for them."""

    def __init__(self, seed: int, plan: FaultPlan) -> None:
        self._rng = random.Random(f"weather {seed}")  # noqa: S311 - reproducible is the point
        self._plan = plan
        self._now: list[Fault] = []
        self.healed = False
        """Nothing goes wrong any more, except that things take the time they take."""

    def begin(self, fault: Fault) -> None:
        """``fault`` is in force."""
        self._now.append(fault)

    def end(self, fault: Fault) -> None:
        """``fault`` is over; harmless if it was already."""
        if fault in self._now:
            self._now.remove(fault)

    def heal(self) -> None:
        """End everything."""
        self._now.clear()
        self.healed = True

    def cut_s(self, a: NodeId, b: NodeId, now_s: float) -> float:
        """For how long nothing passes between these two; 0 if they are connected."""
        cuts = [fault for fault in self._now if isinstance(fault, Cut) and {fault.node, fault.other} == {a, b}]
        return max([0.0] + [fault.at_s + fault.for_s - now_s for fault in cuts])

    def frame_delay_s(self, a: NodeId, b: NodeId) -> float:
        """How long a frame from ``a`` to ``b`` travels."""
        return self._rng.uniform(0, self._plan.frame_delay_s) + self._slow_s(a, b)

    def copy_delay_s(self, a: NodeId, b: NodeId) -> float:
        """How long a copy from ``a`` to ``b`` travels: less than a store lets a slot rest, however many storms."""
        delay_s = self._rng.uniform(0, self._plan.copy_delay_s) + self._slow_s(a, b)
        late = [self._rng.uniform(0, storm.late_s) for storm in self._storms() if self._rng.random() < storm.late_share]
        return delay_s + max(late, default=0.0)

    def copy_lost(self) -> bool:
        """Whether this copy is lost."""
        return any(self._rng.random() < storm.lost_share for storm in self._storms())

    def flipped_byte(self, nbytes: int) -> int | None:
        """Which of this copy's bytes lands wrong."""
        for storm in self._storms():
            if self._rng.random() < storm.corrupt_share:
                return self._rng.randrange(nbytes)
        return None

    def pick(self, count: int) -> int:
        """An index below ``count``, for faults that choose a victim when they strike."""
        return self._rng.randrange(count)

    def _storms(self) -> list[Storm]:
        return [fault for fault in self._now if isinstance(fault, Storm)]

    def _slow_s(self, a: NodeId, b: NodeId) -> float:
        worst_s = max(
            (fault.delay_s for fault in self._now if isinstance(fault, Slow) and fault.node in (a, b)), default=0
        )
        return self._rng.uniform(0, worst_s) if worst_s else 0.0
