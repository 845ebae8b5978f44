"""What the store's commands show: plain data in, rich tables out. No I/O."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import Any

import msgspec
from rich import box
from rich.markup import escape
from rich.table import Table

from cluster.asking import StoreRef
from tracehaul.wire.blocks import DrainState, PinInfo, PinList, TierInfo, TierList
from tracehaul.wire.ids import BlockHash, NodeId
from tracehaul.wire.operations import Description, Located, ScrubbedTier, ScrubState

RANGES_MAX = 24


def size(nbytes: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def duration(seconds: float) -> str:
    """``3725`` as ``1h02m``."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def share(part: float, whole: float) -> str:
    """In percent; of nothing a dash."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


def limit(name: str, value: Any) -> str:
    """A limit's value with the unit that its name ends with."""
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(str(key))}: {limit(name, one)}" for key, one in sorted(value.items())) or "none"
    if name.endswith("_bytes_s"):
        return f"{size(value)}/s" if value else "0 (never)"
    if name.endswith("_bytes"):
        return size(value)
    return f"{value:g} s" if name.endswith("_s") else str(value)


def _table(*columns: str, rows: Iterable[Sequence[str]], right: Iterable[str] = (), wrap: bool = False) -> Table:
    """``right``: columns of numbers. ``wrap``: the last column may take several lines."""
    table, numbers = Table(box=box.SIMPLE_HEAD), set(right)
    for column in columns:
        justify = "right" if column in numbers else "left"
        table.add_column(column, no_wrap=not wrap or column != columns[-1], justify=justify)
    for row in rows:
        table.add_row(*row)
    return table


def ping_table(refs: Sequence[StoreRef], round_trips: Mapping[NodeId, Sequence[float]]) -> Table:
    """Round trips in seconds; a node without one did not answer."""

    def row(ref: StoreRef) -> list[str]:
        times = round_trips.get(ref.node)
        numbers = [f"{median(times) * 1e3:.2f}", f"{max(times) * 1e3:.2f}"] if times else ["-", "-"]
        colour = "green" if times and ref.state == "ready" else "yellow" if times else "red"
        return [ref.node, f"[{colour}]{ref.state}[/]", ref.address or "-", *numbers]

    numbers = ("p50 ms", "max ms")
    return _table("node", "state", "address", *numbers, rows=map(row, refs), right=numbers)


DESCRIBED: dict[str, Callable[[StoreRef, Description], object]] = {
    "state": lambda ref, d: ref.state,
    "address": lambda ref, d: ref.address,
    "version": lambda ref, d: d.version,
    "generation": lambda ref, d: d.generation,
    "up for": lambda ref, d: duration(d.uptime_s),
    "transports": lambda ref, d: ", ".join(d.transports),
    "memory": lambda ref, d: f"{size(d.slots * d.slot_bytes)} in {d.slots} slots of {size(d.slot_bytes)}",
    "blocks": lambda ref, d: f"{d.blocks}, {size(d.bytes_used)}",
    "slots free": lambda ref, d: f"{d.slots_free} ({share(d.slots_free, d.slots)})",
    "slots quarantined": lambda ref, d: d.slots_quarantined,
    "reservations": lambda ref, d: d.reservations,
    "leases": lambda ref, d: d.leases,
    "pins": lambda ref, d: d.pins,
    "waiting for blocks": lambda ref, d: d.waiters,
    "subscribers": lambda ref, d: d.subscribers,
    "tiers": lambda ref, d: ", ".join(tier.name for tier in d.tiers),
}


def describe_table(refs: Sequence[StoreRef], got: Mapping[NodeId, Description]) -> Table:
    """One column per node that answered."""
    nodes = [(ref, got[ref.node]) for ref in refs if ref.node in got]
    rows = [[name, *(str(cell(ref, d)) for ref, d in nodes)] for name, cell in DESCRIBED.items()]
    for tenant in sorted({usage.tenant for _, d in nodes for usage in d.tenants}):
        rows.append([f"tenant {escape(tenant)}" if tenant else "tenants without a quota"])
        for _, d in nodes:
            usage = next((usage for usage in d.tenants if usage.tenant == tenant), None)
            rows[-1].append(f"{size(usage.used_bytes)} of {size(usage.quota_bytes)}" if usage else "no quota")
    for name in dict.fromkeys(name for _, d in nodes for name in d.counters):
        rows.append([name.replace("_", " "), *(str(d.counters.get(name, "-")) for _, d in nodes)])
    return _table("", *(ref.node for ref, _ in nodes), rows=rows)


def limits_table(got: Mapping[NodeId, Description]) -> Table:
    """Every limit, one column per node."""

    def row(name: str) -> list[str]:
        live = any(name in d.live for d in got.values())
        cells = [limit(name, d.limits[name]) if name in d.limits else "-" for d in got.values()]
        return [name, *cells, "yes" if live else "[dim]at start[/]"]

    names = dict.fromkeys(name for d in got.values() for name in d.limits)
    return _table("limit", *got, "can be set", rows=map(row, names))


def tiers_table(got: Mapping[NodeId, TierList]) -> Table:
    """One row per node and tier."""

    def row(node: NodeId, tier: TierInfo) -> list[str]:
        counters = ", ".join(f"{name} {count}" for name, count in tier.counters.items() if count)
        used, most = size(tier.bytes_used), size(tier.bytes_max)
        return [node, tier.name, str(tier.blocks), used, most, share(tier.bytes_used, tier.bytes_max), counters or "-"]

    rows = [row(node, tier) for node, reply in got.items() for tier in reply.tiers]
    numbers = ("blocks", "used", "of", "share")
    return _table("node", "tier", *numbers, "counters", rows=rows, right=numbers, wrap=True)


def pins_table(got: Mapping[NodeId, PinList]) -> Table:
    """One row per node and pin, the first to end first."""

    def row(node: NodeId, pin: PinInfo) -> list[str]:
        names = [node, escape(pin.trace), escape(pin.tenant) or "-", pin.kind]
        return [*names, str(pin.blocks), str(pin.held), size(pin.bytes), duration(pin.remaining_s)]

    rows = [row(node, pin) for node, reply in got.items() for pin in reply.pins]
    numbers = ("blocks", "held", "size", "ends in")
    return _table("node", "trace", "tenant", "kind", *numbers, rows=rows, right=numbers)


class Holding(msgspec.Struct, frozen=True):
    """What one node, or all of them together, hold of a sequence of blocks."""

    run: int
    """Blocks of the leading run."""
    tiers: dict[str, int]
    """Blocks by tier; one that two tiers hold counts in both."""
    held: int
    """Blocks in any tier."""


def holding(located: Iterable[Located], count: int) -> Holding:
    """Of several answers together."""
    tiers: dict[str, bytearray] = {}
    for answer in located:
        for name, held in answer.held.items():
            have = tiers.setdefault(name, bytearray(count))
            for i, there in enumerate(held):
                have[i] |= there
    anywhere = bytes([any(have[i] for have in tiers.values()) for i in range(count)])
    run = anywhere.find(0)
    return Holding(count if run < 0 else run, {name: have.count(1) for name, have in tiers.items()}, anywhere.count(1))


def ranges(located: Located, count: int) -> list[tuple[int, int, str]]:
    """Runs of blocks that are in the same tiers: first, last, the tiers' names; those in none are left out."""
    places = ["+".join(name for name, held in located.held.items() if held[i]) for i in range(count)]
    found: list[tuple[int, int, str]] = []
    for where, run in groupby(range(count), key=lambda i: places[i]):
        indices = list(run)
        if where:
            found.append((indices[0], indices[-1], where))
    return found


def query_table(got: Mapping[NodeId, Located], count: int) -> Table:
    """Per node what it holds of the blocks 0 to ``count - 1``, then of all nodes together."""

    def row(node: NodeId, located: Located) -> list[str]:
        own, runs = holding([located], count), ranges(located, count)
        parts = [f"{first}-{last} {where}" if last > first else f"{first} {where}" for first, last, where in runs]
        more = f", and {len(parts) - RANGES_MAX} more" if len(parts) > RANGES_MAX else ""
        return [node, str(own.run), str(own.held), ", ".join(parts[:RANGES_MAX]) + more or "-"]

    numbers = ("leading run", "held")
    rows = [row(node, located) for node, located in got.items()]
    table = _table("node", *numbers, "where (block numbers)", rows=rows, right=numbers, wrap=True)
    if len(got) > 1:
        every = holding(got.values(), count)
        table.add_section()
        table.add_row("all nodes", str(every.run), str(every.held), "")
    return table


def hashes_table(got: Mapping[NodeId, Located], hashes: Sequence[BlockHash]) -> Table:
    """Per block where it is."""

    def cell(located: Located, i: int) -> str:
        return "+".join(name for name, held in located.held.items() if held[i]) or "-"

    rows = [[one.hex(), *(cell(located, i) for located in got.values())] for i, one in enumerate(hashes)]
    return _table("block", *got, rows=rows)


def scrub_table(got: Mapping[NodeId, ScrubState]) -> Table:
    """One row per node and tier."""

    def row(node: NodeId, state: ScrubState, tier: ScrubbedTier) -> list[str]:
        bad = f"[red]{tier.bad}[/]" if tier.bad else "0"
        return [node, state.state, tier.name, f"{tier.checked} of {tier.blocks}", bad]

    rows = [row(node, state, tier) for node, state in got.items() for tier in state.tiers]
    numbers = ("checked", "bad, dropped")
    return _table("node", "state", "tier", *numbers, rows=rows, right=numbers)


def drain_table(got: Mapping[NodeId, DrainState]) -> Table:
    """One row per node."""

    def row(node: NodeId, state: DrainState) -> list[str]:
        left = [str(state.blocks_left), size(state.bytes_left), str(state.pins_left)]
        return [node, state.state, *left, str(state.blocks_moved), size(state.bytes_moved), str(state.blocks_lost)]

    numbers = ("blocks left", "left", "pins left", "blocks moved", "moved", "lost")
    return _table("node", "state", *numbers, rows=[row(n, s) for n, s in got.items()], right=numbers)


BENCHED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "transport": lambda r: r["transport"],
    "blocks": lambda r: f"{r['blocks']} of {size(r['block_bytes'])}",
    "blocks that got no slot": lambda r: str(r["refused"]),
    "put GB/s": lambda r: f"{r['put_gb_s']:.2f}",
    "get GB/s": lambda r: f"{r['get_gb_s']:.2f}",
    "memcpy here GB/s, one thread": lambda r: f"{r['memcpy_gb_s']:.2f}",
    "put one block, p50 ms": lambda r: f"{r['put_block_ms']:.2f}",
    "get one block, p50 ms": lambda r: f"{r['get_block_ms']:.2f}",
    "1000 blocks there? p50 ms": lambda r: f"{r['exists_ms']:.2f}",
    "ping, p50 ms": lambda r: f"{r['ping_ms']:.2f}",
}


def bench_table(got: Mapping[NodeId, Mapping[str, Any]]) -> Table:
    """One column per node, from the fields of a :class:`cluster.store.bench.BenchResult`."""
    rows = [[name, *map(cell, got.values())] for name, cell in BENCHED.items()]
    return _table("", *got, rows=rows, right=got)
