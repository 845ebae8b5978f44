"""Which life of a node has its name: the highest rank that was seen or issued, kept when the node is gone. Pure.

A rank is an epoch and the life's own random number. An epoch is issued once, higher than any that is known for the
name, and no lower than the time in seconds: so a router that knows of none, since it has lost what it kept, still
issues none that is older than what it has issued before. Two routers that do not hear of each other's lives may issue
one epoch twice; then the number decides, everywhere in the same way.
"""

from collections.abc import Iterable
from typing import NamedTuple

from tracehaul.wire.ids import Epoch, Generation, NodeId

NAMES_MAX = 16_384
"""Names remembered; beyond, those with the lowest epochs are forgotten."""


class Mark(NamedTuple):
    """The life that has a name, or had it last."""

    node: NodeId
    epoch: Epoch
    generation: Generation

    @property
    def rank(self) -> tuple[Epoch, Generation]:
        """As :attr:`tracehaul.wire.cluster.NodeInfo.rank`."""
        return self.epoch, self.generation


class Epochs:
    """High-water marks by name."""

    def __init__(self, kept: Iterable[Mark] = (), names_max: int = NAMES_MAX) -> None:
        self._marks = {mark.node: mark for mark in kept}
        self._names_max = names_max

    def marks(self) -> list[Mark]:
        """All there are, by name: to be kept."""
        return [self._marks[node] for node in sorted(self._marks)]

    def issue(self, node: NodeId, generation: Generation, wall_s: float) -> Epoch:
        """An epoch for a life that has none. One that asks again, as it did not hear the answer, is told the same."""
        mark = self._marks.get(node)
        if mark is not None and mark.generation == generation:
            return mark.epoch
        epoch = Epoch(max(int(wall_s), 1 + (mark.epoch if mark is not None else 0)))
        self._set(Mark(node, epoch, generation))
        return epoch

    def shown(self, node: NodeId, epoch: Epoch, generation: Generation) -> Epoch | None:
        """A life shows the epoch that it has: it is answered with the one that it is known by, or None: another life of
        a higher rank has its name."""
        mark = self._marks.get(node)
        if mark is not None and mark.generation == generation:
            epoch = max(epoch, mark.epoch)
        elif mark is not None and mark.rank > (epoch, generation):
            return None
        self._set(Mark(node, epoch, generation))
        return epoch

    def _set(self, mark: Mark) -> None:
        self._marks[mark.node] = mark
        if len(self._marks) > self._names_max:
            others = [other for other in self._marks.values() if other.node != mark.node]
            del self._marks[min(others, key=lambda other: (other.epoch, other.node)).node]
