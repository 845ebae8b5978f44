"""Which blocks traces asked to keep. Pure.

A pin belongs to a trace of a tenant and covers blocks by hash, whether they are there yet or not. A *hard* pin keeps
its blocks whatever happens; a *soft* one gives them a priority that decays: p(t) = priority * 2^(-t / half life).
All soft pins of a node decay alike, so which of two is higher never changes: log2(priority) + start / half life is a
constant, the pin's *rank*, and nothing has to be recomputed as time passes. Where p reaches 1, the priority of an
unpinned block, the pin ends. Every pin ends.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush
from math import inf, log2
from typing import NamedTuple

from kvstore.config import StoreConfig
from tracehaul.wire.blocks import PinKind
from tracehaul.wire.ids import BlockHash, TraceId

PRIORITY_MAX = float(2**32)

PinKey = tuple[str, TraceId]
"""Tenant and trace: one tenant's traces are never another's."""

HARD = inf
"""Rank of a hard pin."""


class HeldPin(NamedTuple):
    """An open pin. ``hashes`` and ``gaps`` grow while it lives."""

    kind: PinKind
    rank: float
    """Of its blocks: those of the lowest go first. :data:`HARD` is never evicted."""
    until_s: float
    hashes: dict[BlockHash, None]
    gaps: dict[BlockHash, None]
    """Blocks that were missed in the prefixes of those."""
    replicas: int = 1
    """Nodes that are to have it."""


class Pins:
    """Open pins, and the rank that they give to blocks."""

    def __init__(self, config: StoreConfig) -> None:
        self._configure(config)
        slots = config.slots_max
        self._covered_tenant_max = slots
        self._covered_max = 4 * slots
        self._pins: dict[PinKey, HeldPin] = {}
        self._by_hash: dict[BlockHash, dict[PinKey, None]] = {}
        self._by_gap: dict[BlockHash, dict[PinKey, None]] = {}
        self._heap: list[tuple[float, PinKey]] = []  # may name pins that have ended or moved
        # By tenant; a block that two pins cover counts twice.
        self._open: Counter[str] = Counter()
        self._covered: Counter[str] = Counter()
        self._hard: Counter[str] = Counter()

    def reconfigure(self, config: StoreConfig) -> str | None:
        """Other limits from now on. Returns why not, with nothing changed, where open pins exceed them."""
        before = self._config
        self._configure(config)
        misfit = self._misfit()
        if misfit is not None:
            self._configure(before)
        return misfit

    def _configure(self, config: StoreConfig) -> None:
        self._config = config
        self._hard_max = int(config.slots_max * config.hard_share_max)
        self._hard_tenant_max = int(config.slots_max * config.hard_tenant_share_max)

    def _misfit(self) -> str | None:
        config = self._config
        if len(self._pins) > config.pins_max:
            return f"{len(self._pins)} pins are open, pins_max would be {config.pins_max}"
        if self._hard.total() > self._hard_max:
            return f"hard pins cover {self._hard.total()} blocks, hard_share_max would allow {self._hard_max}"
        for tenant, opened in sorted(self._open.items()):
            if opened > config.pins_tenant_max:
                return f"tenant {tenant!r} has {opened} pins, pins_tenant_max would be {config.pins_tenant_max}"
            if self._hard[tenant] > self._hard_tenant_max:
                held = f"hard pins of tenant {tenant!r} cover {self._hard[tenant]} blocks"
                return f"{held}, hard_tenant_share_max would allow {self._hard_tenant_max}"
            if (hard := self._hard_of_group(tenant)) > (quota := self._quota(tenant)):
                return f"hard pins of tenant {tenant!r} cover {hard} blocks, its quota would be {quota}"
        return None

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def hard(self) -> int:
        """Blocks that hard pins cover, each pin's counted."""
        return sum(list(self._hard.values()))  # metrics read this from another thread

    def get(self, key: PinKey) -> HeldPin | None:
        """A trace's pin."""
        return self._pins.get(key)

    def rank(self, block_hash: BlockHash) -> float | None:
        """The highest rank that pins give to a block; None if no pin covers it."""
        keys = self._by_hash.get(block_hash)
        return None if keys is None else max([self._pins[key].rank for key in keys])

    def keys(self, block_hash: BlockHash) -> list[PinKey]:
        """The pins that cover a block, the oldest first."""
        return list(self._by_hash.get(block_hash, ()))

    def all(self) -> list[tuple[PinKey, HeldPin]]:
        """Every open one, the first to end first."""
        return sorted(self._pins.items(), key=lambda item: (item[1].until_s, item[0]))

    def pin(
        self,
        key: PinKey,
        hashes: Iterable[BlockHash],
        kind: PinKind,
        priority: float,
        ttl_s: float,
        now_s: float,
        replicas: int = 1,
    ) -> str | None:
        """Open a pin, or add ``hashes`` to an open one and renew it. Returns why not, with nothing changed, or None.

        A renewed pin may rank its blocks lower than before: :meth:`end` it first where that must be noticed.
        """
        assert priority > 0
        assert ttl_s > 0
        before = self._pins.get(key)
        covered = dict(before.hashes) if before is not None else {}
        covered.update(dict.fromkeys(hashes))
        refusal = self._refusal(key, before, len(covered), kind)
        if refusal is not None:
            return refusal
        ttl_s = min(ttl_s, self._config.pin_ttl_max_s)
        rank = HARD
        if kind == "soft":
            octaves = log2(min(priority, PRIORITY_MAX))
            rank = octaves + now_s / self._config.pin_half_life_s
            ttl_s = min(ttl_s, max(0.0, octaves * self._config.pin_half_life_s))
        if before is not None:
            self._count(key, before, -1)
        for block_hash in covered:
            self._by_hash.setdefault(block_hash, {})[key] = None
        gaps = {} if before is None else before.gaps
        held = self._pins[key] = HeldPin(kind, rank, now_s + ttl_s, covered, gaps, replicas)
        self._count(key, held, 1)
        self._ends(key, held)
        return None

    def _ends(self, key: PinKey, held: HeldPin) -> None:
        heappush(self._heap, (held.until_s, key))
        if len(self._heap) > 2 * len(self._pins) + 64:  # renewed ones pile up
            self._heap = [(held.until_s, key) for key, held in self._pins.items()]
            heapify(self._heap)

    def touched_by(self, block_hash: BlockHash) -> list[PinKey]:
        """The pins that cover a block, or miss it in a prefix."""
        covering, missing = self._by_hash.get(block_hash), self._by_gap.get(block_hash)
        if covering is None and missing is None:
            return []
        return list({**(covering or {}), **(missing or {})})

    def expect(self, key: PinKey, gaps: Iterable[BlockHash], instead_of: BlockHash | None = None) -> None:
        """These are missed in the prefixes that a pin covers, and one is no longer. As many are remembered as it
        covers blocks."""
        held = self._pins[key]
        if instead_of is not None and instead_of in held.gaps:
            self._forget_gap(key, instead_of)
            del held.gaps[instead_of]
        for gap in gaps:
            if len(held.gaps) >= len(held.hashes):
                return
            held.gaps[gap] = None
            self._by_gap.setdefault(gap, {})[key] = None

    def grow(self, key: PinKey, hashes: Mapping[BlockHash, None]) -> bool:
        """Let an open pin cover these too; False, with nothing changed, if its limits do not allow that."""
        held = self._pins[key]
        if self._refusal(key, held, len(held.hashes) + len(hashes), held.kind) is not None:
            return False
        self._count(key, held, -1)
        held.hashes.update(hashes)
        for block_hash in hashes:
            self._by_hash.setdefault(block_hash, {})[key] = None
        self._count(key, held, 1)
        return True

    def soften(self, key: PinKey, now_s: float) -> None:
        """Make a hard pin the strongest of soft ones."""
        held = self._pins[key]
        assert held.kind == "hard"
        octaves, half_life_s = log2(PRIORITY_MAX), self._config.pin_half_life_s
        self._count(key, held, -1)
        until_s = min(held.until_s, now_s + octaves * half_life_s)
        held = self._pins[key] = held._replace(kind="soft", rank=octaves + now_s / half_life_s, until_s=until_s)
        self._count(key, held, 1)
        self._ends(key, held)

    def end(self, key: PinKey) -> HeldPin | None:
        """Forget a pin; returns what it was."""
        held = self._pins.pop(key, None)
        if held is None:
            return None
        self._count(key, held, -1)
        for block_hash in held.hashes:
            keys = self._by_hash[block_hash]
            del keys[key]
            if not keys:
                del self._by_hash[block_hash]
        for gap in held.gaps:
            self._forget_gap(key, gap)
        return held

    def _forget_gap(self, key: PinKey, gap: BlockHash) -> None:
        keys = self._by_gap[gap]
        del keys[key]
        if not keys:
            del self._by_gap[gap]

    def deadline_s(self) -> float | None:
        """When the first of them ends."""
        first = self._first()
        return None if first is None else self._pins[first].until_s

    def next_expired(self, now_s: float) -> PinKey | None:
        """One whose time has come, if any. It stays open until :meth:`end`."""
        first = self._first()
        return first if first is not None and self._pins[first].until_s <= now_s else None

    def _first(self) -> PinKey | None:
        while self._heap:
            until_s, key = self._heap[0]
            held = self._pins.get(key)
            if held is not None and held.until_s == until_s:
                return key
            heappop(self._heap)
        return None

    def _refusal(self, key: PinKey, before: HeldPin | None, blocks: int, kind: PinKind) -> str | None:
        tenant = key[0]
        if before is None:
            if len(self._pins) >= self._config.pins_max:
                return f"{len(self._pins)} pins are open"
            if self._open[tenant] >= self._config.pins_tenant_max:
                return f"{self._open[tenant]} pins of this tenant are open"
        more = blocks - (len(before.hashes) if before is not None else 0)
        if self._covered.total() + more > self._covered_max or self._covered[tenant] + more > self._covered_tenant_max:
            return "pins cover too many blocks"
        if kind == "hard":
            more = blocks - (len(before.hashes) if before is not None and before.kind == "hard" else 0)
            if self._hard.total() + more > self._hard_max or self._hard[tenant] + more > self._hard_tenant_max:
                return "hard pins cover too many blocks"
            if self._hard_of_group(tenant) + more > self._quota(tenant):
                return "hard pins cover more than the quota"  # others could not get theirs
        return None

    def _quota(self, tenant: str) -> int:
        """In slots; tenants without one of their own have what is left, together."""
        quotas, slot_bytes = self._config.quota_bytes, self._config.slot_bytes
        if tenant in quotas:
            return quotas[tenant] // slot_bytes
        return self._config.slots_max - sum(quota // slot_bytes for quota in quotas.values())

    def _hard_of_group(self, tenant: str) -> int:
        quotas = self._config.quota_bytes
        if tenant in quotas:
            return self._hard[tenant]
        return sum(blocks for other, blocks in self._hard.items() if other not in quotas)

    def _count(self, key: PinKey, held: HeldPin, sign: int) -> None:
        tenant = key[0]
        self._add(self._open, tenant, sign)
        self._add(self._covered, tenant, sign * len(held.hashes))
        if held.kind == "hard":
            self._add(self._hard, tenant, sign * len(held.hashes))

    @staticmethod
    def _add(counter: Counter[str], tenant: str, more: int) -> None:
        counter[tenant] += more
        if not counter[tenant]:
            del counter[tenant]

    def check(self) -> None:
        """Assert that the counts and the index agree with the pins."""
        by_hash: dict[BlockHash, set[PinKey]] = {}
        by_gap: dict[BlockHash, set[PinKey]] = {}
        opened: Counter[str] = Counter()
        covered: Counter[str] = Counter()
        hard: Counter[str] = Counter()
        for key, held in self._pins.items():
            opened[key[0]] += 1
            covered[key[0]] += len(held.hashes)
            hard[key[0]] += len(held.hashes) if held.kind == "hard" else 0
            for block_hash in held.hashes:
                by_hash.setdefault(block_hash, set()).add(key)
            for gap in held.gaps:
                by_gap.setdefault(gap, set()).add(key)
        assert by_gap == {gap: set(keys) for gap, keys in self._by_gap.items()}
        assert by_hash == {block_hash: set(keys) for block_hash, keys in self._by_hash.items()}
        assert (+opened, +covered, +hard) == (self._open, self._covered, self._hard)
        assert hard.total() <= self._hard_max
        assert len(self._pins) <= self._config.pins_max
