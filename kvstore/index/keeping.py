"""What pins mean for the blocks of an arena: they cover the prefixes of what they name, and grow with them. Pure.

A pin names blocks; it covers them and what is published of their prefixes. Where a block of a prefix is published
only later, the pin grows to cover it then, so that all that a hard pin keeps (a prefix is never evicted before its
continuation) counts against its limits. One that outgrows them is softened: better less kept than was hoped for, than
more than others can bear.
"""

from collections.abc import Callable, Iterable, Mapping
from math import log2

from kvstore.index.continuations import Continuations
from kvstore.index.pin_records import KeptPin
from kvstore.index.pins import PRIORITY_MAX, PinKey, Pins
from tracehaul.wire.blocks import Pin, PinInfo, Pinned
from tracehaul.wire.ids import BlockHash


class Keeping:
    """The pins of one arena. ``published`` and ``continuations`` are the arena's own index, read only.

    ``repinned`` is told of blocks that pins now say something else of; ``size_of`` tells a held block's size, else 0.
    """

    def __init__(
        self,
        pins: Pins,
        published: Mapping[BlockHash, int],
        continuations: Continuations,
        repinned: Callable[[Iterable[BlockHash]], None],
        size_of: Callable[[BlockHash], int],
    ) -> None:
        self.pins = pins
        self.softened = 0
        """Hard pins that outgrew their limits."""
        self._published = published
        self._continuations = continuations
        self._repinned = repinned
        self._size_of = size_of

    def pin(self, request: Pin, now_s: float) -> Pinned | str:
        """As :meth:`kvstore.index.arena.Arena.pin`. A pin of no priority has ended: :meth:`expire` ends it."""
        key = request.tenant, request.trace
        covered: dict[BlockHash, None] = dict.fromkeys(request.hashes)
        gaps: list[BlockHash] = []
        for block_hash in request.hashes:
            found, gap = self._prefix(block_hash, covered)
            covered.update(dict.fromkeys(found))
            gaps += [] if gap is None else [gap]
        refusal = self.pins.pin(key, covered, request.kind, request.priority, request.ttl_s, now_s, request.replicas)
        if refusal is not None:
            return refusal
        held = self.pins.get(key)
        assert held is not None
        self.pins.expect(key, gaps)
        self._repinned(held.hashes)
        info = self.info(key, now_s)
        return Pinned(info.blocks, info.held, info.remaining_s)

    def arrived(self, block_hash: BlockHash, now_s: float) -> None:
        """A block was published: pins that cover it, or miss it in a prefix, cover its prefix from now on."""
        for key in self.pins.touched_by(block_hash):
            held = self.pins.get(key)
            assert held is not None
            found, gap = self._prefix(block_hash, held.hashes)
            more = dict.fromkeys(found[found[0] in held.hashes :])
            if more and not self.pins.grow(key, more) and held.kind == "hard":
                self.pins.soften(key, now_s)
                self.softened += 1
                self.pins.grow(key, more)
                more = {**held.hashes, **more}
            self.pins.expect(key, [] if gap is None else [gap], instead_of=block_hash)
            self._repinned(more)

    def _prefix(
        self, block_hash: BlockHash, covered: Mapping[BlockHash, None]
    ) -> tuple[list[BlockHash], BlockHash | None]:
        """A block, if it is published, and what is of its prefix, up to the first that is covered already; where there
        is none such, the parent that is missed."""
        found: list[BlockHash] = []
        gap = None
        for ancestor in self._continuations.ancestry(block_hash):
            if ancestor in covered and ancestor != block_hash:
                return found, None
            found.append(ancestor)
            gap = self._continuations.parent(self._published[ancestor])
        return found, gap

    def unpin(self, key: PinKey) -> None:
        """End a pin. Harmless if there is none."""
        held = self.pins.end(key)
        if held is not None:
            self._repinned(held.hashes)

    def repin(self, kept: KeptPin, now_s: float) -> str | None:
        """Take over what is left of a pin of the node's former life; returns why not, or None."""
        priority = 2.0 ** min(kept.octaves, log2(PRIORITY_MAX))
        refusal = self.pins.pin(kept.key, kept.hashes, kept.kind, priority, kept.remaining_s, now_s, kept.replicas)
        if refusal is None:
            self._repinned(kept.hashes)
        return refusal

    def expire(self, now_s: float) -> None:
        """End every pin whose time has come."""
        while (key := self.pins.next_expired(now_s)) is not None:
            self.unpin(key)

    def info(self, key: PinKey, now_s: float) -> PinInfo:
        """An open pin, described. Linear in what it covers."""
        held = self.pins.get(key)
        assert held is not None
        sizes = [size for size in map(self._size_of, held.hashes) if size]
        tenant, trace = key
        return PinInfo(trace, tenant, held.kind, len(held.hashes), len(sizes), sum(sizes), held.until_s - now_s)
