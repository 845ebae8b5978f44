"""The one place that builds a store node."""

from collections.abc import Sequence
from typing import NamedTuple

from kvstore.config import StoreConfig
from kvstore.copies.copier import Holdings
from kvstore.copies.neighbours import Neighbours, Others
from kvstore.index.arena import Arena
from kvstore.node.events import Feed
from kvstore.node.node import StoreNode
from kvstore.node.operations import Operations
from kvstore.node.parts import Parts
from kvstore.node.pin_journal import PinJournal
from kvstore.node.pin_keeper import PinKeeper
from kvstore.node.pinning import Pinning
from kvstore.node.scrub import Scrubber
from kvstore.node.settler import Settler
from kvstore.node.stats import StoreStats
from kvstore.node.verifier import Verifier
from kvstore.node.waiting import Waiters
from kvstore.tiers.base import Tier
from kvstore.tiers.tiering import Tiering, TieringConfig
from tracehaul.runtime import clock
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.base import Memory
from tracehaul.transfer.plane import Plane
from tracehaul.wire.ids import Generation


class Backing(NamedTuple):
    """What is below a node's memory. The node has it from then on, and closes it."""

    tier: Tier
    tiering: TieringConfig = TieringConfig()
    journal: PinJournal | None = None
    """Where pins are kept: those found there are in force from the start."""


def assemble_store(
    config: StoreConfig,
    generation: Generation,
    planes: Sequence[Plane],
    memory: Memory,
    offload: Offload,
    backing: Backing | None = None,
    others: Others | None = None,
) -> StoreNode:
    """A node that serves ``memory``, at least ``config.arena_bytes`` and registered with every plane.

    These outlive it, and so does ``offload``; :meth:`StoreNode.aclose` ends the rest in its order. Without ``others``
    it makes no copies elsewhere.
    """
    assert memory.buffer.nbytes >= config.arena_bytes
    parts = _parts(config, generation, planes, memory.buffer, backing)
    journal = None if backing is None else backing.journal
    keeper = None if journal is None else PinKeeper(parts.arena, journal, config.pin_half_life_s)
    verifier = Verifier(parts, memory.buffer, offload)
    neighbours = None if others is None else _neighbours(others, parts, memory.buffer, offload, verifier)
    node = StoreNode(
        parts,
        verifier,
        Pinning(parts, keeper, neighbours),
        Operations(parts, _scrubber(parts, memory.buffer, offload, verifier)),
        journal,
        neighbours,
    )
    parts.settler.settle()  # pins of a former life have ends
    return node


def _parts(
    config: StoreConfig, generation: Generation, planes: Sequence[Plane], buffer: memoryview, backing: Backing | None
) -> Parts:
    arena = Arena(config)
    feed = Feed(generation, changes_max=config.changes_max, subscribers_max=config.subscribers_max)
    waiters = Waiters(config.waiters_max)
    settler = Settler(arena, feed, waiters)
    if backing is not None:
        tier, limits = backing.tier, backing.tiering
        settler.tiering = Tiering(arena, buffer, config.slot_bytes, tier, limits, settler.announce, settler.settle)
    return Parts(generation, tuple(planes), arena, feed, waiters, settler, StoreStats(), settler.tiering)


def _neighbours(others: Others, parts: Parts, buffer: memoryview, offload: Offload, verifier: Verifier) -> Neighbours:
    """Knows the pins of a former life from the start."""
    arena, config, settler = parts.arena, parts.arena.config, parts.settler
    holdings = Holdings(arena, buffer, config.slot_bytes, parts.tiering, settler.settle, verifier.try_to_look)
    neighbours = settler.neighbours = Neighbours(others, parts.planes, offload, holdings, config.pin_half_life_s)
    neighbours.restore(arena.open_pins(clock.now_s()))
    return neighbours


def _scrubber(parts: Parts, buffer: memoryview, offload: Offload, verifier: Verifier) -> Scrubber:
    """Of memory, and of what can be read for nothing."""
    free = [] if parts.tiering is None else [part for part in parts.tiering.tier.parts if not part.metered]
    slot_bytes, settle = parts.arena.config.slot_bytes, parts.settler.settle
    return Scrubber(parts.arena, buffer, slot_bytes, offload, free, settle, verifier.found_bad)
