"""Which store node holds which blocks: soft state built from the nodes' own numbered events. Pure.

A hole in a node's numbers, or another generation, means that what is known of it is stale: the shell subscribes
again and a snapshot replaces it. A stale entry costs a miss, never a wrong answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tracehaul.wire.blocks import Events, Snapshot, Stored
from tracehaul.wire.ids import BlockHash, Generation, NodeId


@dataclass
class _Node:
    generation: Generation
    sequence: int
    held: set[BlockHash] = field(default_factory=set[BlockHash])
    complete: bool = False


class Index:
    """Block hash -> holders, fleet wide."""

    def __init__(self) -> None:
        self._nodes: dict[NodeId, _Node] = {}

    def snapshot(self, node: NodeId, part: Snapshot) -> None:
        """Take in one part of a node's snapshot; parts of another one replace what was known."""
        known = self._nodes.get(node)
        if known is None or known.complete or known.generation != part.generation or known.sequence != part.sequence:
            known = _Node(part.generation, part.sequence)
            self._nodes[node] = known
        known.held.update(part.hashes)
        known.complete = part.last

    def events(self, node: NodeId, events: Events) -> bool:
        """Take in changes; False if numbers are missing: then subscribe again."""
        known = self._nodes.get(node)
        if (
            known is None
            or not known.complete
            or known.generation != events.generation
            or events.first > known.sequence + 1
        ):
            return False
        for offset, change in enumerate(events.changes):
            if events.first + offset <= known.sequence:
                continue  # already in the snapshot
            if isinstance(change, Stored):
                known.held.add(change.hash)
            else:
                known.held.discard(change.hash)
            known.sequence = events.first + offset
        return True

    def forget(self, node: NodeId) -> None:
        """The node is gone, or its subscription broke."""
        self._nodes.pop(node, None)

    def held(self, node: NodeId) -> frozenset[BlockHash]:
        """What the node is known to hold."""
        known = self._nodes.get(node)
        return frozenset(known.held) if known is not None else frozenset()

    def blocks(self) -> dict[NodeId, int]:
        """Blocks known per node."""
        return {node: len(known.held) for node, known in self._nodes.items()}

    def match(self, hashes: Sequence[BlockHash]) -> int:
        """Length of the leading run of ``hashes`` that live nodes hold together."""
        held = [known.held for known in self._nodes.values()]
        return next((i for i, block in enumerate(hashes) if not any(block in node for node in held)), len(hashes))
