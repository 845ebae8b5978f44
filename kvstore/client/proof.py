"""Which stores have proved that they take and give blocks, and so whether a worker serves. Pure."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from tracehaul.wire.ids import Generation, NodeId

RETRY_S = 1.0
FAULT_CHARS_MAX = 200
"""Of one store's fault."""
FAULTS_TOLD_MAX = 4


class StoreLife(NamedTuple):
    """One life of one store node."""

    node: NodeId
    generation: Generation


class Proof:
    """What a worker knows of the stores among the members.

    It serves once it is a member and each of them has passed, or there is none. From then on it goes on serving: of a
    store that comes later it only tells the fault.
    """

    def __init__(self) -> None:
        self._lives: tuple[StoreLife, ...] = ()
        self._passed: set[StoreLife] = set()
        self._faults: dict[StoreLife, str] = {}
        self._due_s: dict[StoreLife, float] = {}
        self._serving = False

    @property
    def serving(self) -> bool:
        """Whether it may be given work."""
        return self._serving

    @property
    def fault(self) -> str:
        """What is wrong with which stores, for an operator; empty if nothing is known to be."""
        faults = [f"{life.node}: {why[:FAULT_CHARS_MAX]}" for life, why in sorted(self._faults.items())]
        more = len(faults) - FAULTS_TOLD_MAX
        return "; ".join([*faults[:FAULTS_TOLD_MAX], *([f"and {more} more"] if more > 0 else [])])

    def set(self, lives: Sequence[StoreLife], draining: Collection[NodeId], now_s: float) -> None:
        """The stores that are members now. Those that drain take nothing, so nothing is asked of them."""
        self._lives = tuple(life for life in lives if life.node not in draining)
        known = frozenset(self._lives)
        self._passed &= known
        self._faults = {life: why for life, why in self._faults.items() if life in known}
        due_s = self._due_s
        self._due_s = {life: due_s.get(life, now_s) for life in self._lives if life not in self._passed}
        self._judge()

    def due(self, now_s: float) -> list[StoreLife]:
        """Those to try now."""
        return [life for life, due_s in self._due_s.items() if due_s <= now_s]

    def next_s(self) -> float | None:
        """When the next is due; None: all have passed."""
        return min(self._due_s.values(), default=None)

    def passed(self, life: StoreLife) -> None:
        """A block was put there and got back."""
        if life not in self._lives:
            return
        self._passed.add(life)
        self._faults.pop(life, None)
        self._due_s.pop(life, None)
        self._judge()

    def failed(self, life: StoreLife, why: str, now_s: float) -> None:
        """It could not be; it is tried again a moment later."""
        if life in self._lives and life not in self._passed:
            self._faults[life] = why
            self._due_s[life] = now_s + RETRY_S

    def _judge(self) -> None:
        self._serving = self._serving or self._passed.issuperset(self._lives)
