"""What the store's commands show: plain data in, rich tables out. No I/O."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import Any

import msgspec
from rich import box
from rich.markup import escape
from rich.table import Table

from cluster.members import StoreRef
from tracehaul.wire.blocks import DrainState, PinInfo, TierInfo
from tracehaul.wire.ids import BlockHash, NodeId
from tracehaul.wire.operations import Description, Located, ScrubState

HASH_DIGITS = 12
"""Of a block's hash in tables; all of them with --json."""
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


def _table(*columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right" if column in tuple(right) else "left")
    return table


def ping_table(refs: Sequence[StoreRef], round_trips: Mapping[NodeId, Sequence[float]]) -> Table:
    """Round trips in seconds; a node without one did not answer."""
    table = _table("node", "state", "address", "p50 ms", "max ms", right=("p50 ms", "max ms"))
    for ref in refs:
        times = round_trips.get(ref.node)
        numbers = [f"{median(times) * 1e3:.2f}", f"{max(times) * 1e3:.2f}"] if times else ["-", "-"]
        colour = "green" if times and ref.state == "ready" else "yellow" if times else "red"
        table.add_row(ref.node, f"[{colour}]{ref.state}[/]", ref.address or "-", *numbers)
    return table


def describe_table(refs: Sequence[StoreRef], got: Mapping[NodeId, Description]) -> Table:
    """One column per node that answered."""
    nodes = [ref for ref in refs if ref.node in got]
    table = _table("", *[ref.node for ref in nodes])
    described = [got[ref.node] for ref in nodes]
    rows: list[tuple[str, list[str]]] = [
        ("state", [ref.state for ref in nodes]),
        ("address", [ref.address for ref in nodes]),
        ("version", [d.version for d in described]),
        ("generation", [str(d.generation) for d in described]),
        ("up for", [duration(d.uptime_s) for d in described]),
        ("transports", [", ".join(d.transports) for d in described]),
        ("memory", [f"{size(d.slots * d.slot_bytes)} in {d.slots} slots of {size(d.slot_bytes)}" for d in described]),
        ("blocks", [f"{d.blocks}, {size(d.bytes_used)}" for d in described]),
        ("slots free", [f"{d.slots_free} ({share(d.slots_free, d.slots)})" for d in described]),
        ("slots quarantined", [str(d.slots_quarantined) for d in described]),
        ("reservations", [str(d.reservations) for d in described]),
        ("leases", [str(d.leases) for d in described]),
        ("pins", [str(d.pins) for d in described]),
        ("waiting for blocks", [str(d.waiters) for d in described]),
        ("subscribers", [str(d.subscribers) for d in described]),
        ("tiers", [", ".join(tier.name for tier in d.tiers) for d in described]),
    ]
    tenants = sorted({usage.tenant for d in described for usage in d.tenants})
    for tenant in tenants:
        cells: list[str] = []
        for d in described:
            usage = next((usage for usage in d.tenants if usage.tenant == tenant), None)
            cells.append(f"{size(usage.used_bytes)} of {size(usage.quota_bytes)}" if usage else "no quota")
        rows.append((f"tenant {escape(tenant)}" if tenant else "tenants without a quota", cells))
    counters = list(dict.fromkeys(name for d in described for name in d.counters))
    rows += [(name.replace("_", " "), [str(d.counters.get(name, "-")) for d in described]) for name in counters]
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def limits_table(got: Mapping[NodeId, Description]) -> Table:
    """Every limit, one column per node."""
    table = _table("limit", *got, "can be set")
    for name in dict.fromkeys(name for d in got.values() for name in d.limits):
        live = any(name in d.live for d in got.values())
        cells = [limit(name, d.limits[name]) if name in d.limits else "-" for d in got.values()]
        table.add_row(name, *cells, "yes" if live else "[dim]at start[/]")
    return table


def tiers_table(got: Mapping[NodeId, Sequence[TierInfo]]) -> Table:
    """One row per node and tier."""
    table = _table("node", "tier", "blocks", "used", "of", "share", "counters", right=("blocks", "used", "of", "share"))
    for node, tiers in got.items():
        for tier in tiers:
            counters = ", ".join(f"{name} {count}" for name, count in tier.counters.items() if count)
            table.add_row(
                node,
                tier.name,
                str(tier.blocks),
                size(tier.bytes_used),
                size(tier.bytes_max),
                share(tier.bytes_used, tier.bytes_max),
                counters or "-",
            )
    table.columns[-1].no_wrap = False
    return table


def pins_table(got: Mapping[NodeId, Sequence[PinInfo]]) -> Table:
    """One row per node and pin, the first to end first."""
    numbers = ("blocks", "held", "size", "ends in")
    table = _table("node", "trace", "tenant", "kind", *numbers, right=numbers)
    for node, pins in got.items():
        for pin in pins:
            row = [
                node,
                escape(pin.trace),
                escape(pin.tenant) or "-",
                pin.kind,
                str(pin.blocks),
                str(pin.held),
                size(pin.bytes),
            ]
            table.add_row(*row, duration(pin.remaining_s))
    return table


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
    numbers = ("leading run", "held")
    table = _table("node", *numbers, "where (block numbers)", right=numbers)
    for node, located in got.items():
        own = holding([located], count)
        runs = ranges(located, count)
        parts = [f"{first}-{last} {where}" if last > first else f"{first} {where}" for first, last, where in runs]
        more = f", and {len(parts) - RANGES_MAX} more" if len(parts) > RANGES_MAX else ""
        table.add_row(node, str(own.run), str(own.held), ", ".join(parts[:RANGES_MAX]) + more or "-")
    if len(got) > 1:
        every = holding(got.values(), count)
        table.add_section()
        table.add_row("all nodes", str(every.run), str(every.held), "")
    table.columns[-1].no_wrap = False
    return table


def hashes_table(got: Mapping[NodeId, Located], hashes: Sequence[BlockHash]) -> Table:
    """Per block where it is."""
    table = _table("block", *got)
    for i, block_hash in enumerate(hashes):
        cells = ["+".join(name for name, held in located.held.items() if held[i]) or "-" for located in got.values()]
        table.add_row(block_hash.hex(), *cells)
    return table


def scrub_table(got: Mapping[NodeId, ScrubState]) -> Table:
    """One row per node and tier."""
    table = _table("node", "state", "tier", "checked", "bad, dropped", right=("checked", "bad, dropped"))
    for node, state in got.items():
        for tier in state.tiers:
            bad = f"[red]{tier.bad}[/]" if tier.bad else "0"
            table.add_row(node, state.state, tier.name, f"{tier.checked} of {tier.blocks}", bad)
    return table


def drain_table(got: Mapping[NodeId, DrainState]) -> Table:
    """One row per node."""
    numbers = ("blocks left", "left", "pins left", "blocks moved", "moved", "lost")
    table = _table("node", "state", *numbers, right=numbers)
    for node, state in got.items():
        left = [str(state.blocks_left), size(state.bytes_left), str(state.pins_left)]
        table.add_row(
            node, state.state, *left, str(state.blocks_moved), size(state.bytes_moved), str(state.blocks_lost)
        )
    return table


def bench_table(got: Mapping[NodeId, Mapping[str, Any]]) -> Table:
    """One column per node, from the fields of a :class:`cluster.store_bench.BenchResult`."""
    table = _table("", *got, right=got)
    results = list(got.values())
    rows: list[tuple[str, list[str]]] = [
        ("transport", [r["transport"] for r in results]),
        ("blocks", [f"{r['blocks']} of {size(r['block_bytes'])}" for r in results]),
        ("blocks that got no slot", [str(r["refused"]) for r in results]),
        ("put GB/s", [f"{r['put_gb_s']:.2f}" for r in results]),
        ("get GB/s", [f"{r['get_gb_s']:.2f}" for r in results]),
        ("memcpy here GB/s, one thread", [f"{r['memcpy_gb_s']:.2f}" for r in results]),
        ("put one block, p50 ms", [f"{r['put_block_ms']:.2f}" for r in results]),
        ("get one block, p50 ms", [f"{r['get_block_ms']:.2f}" for r in results]),
        ("1000 blocks there? p50 ms", [f"{r['exists_ms']:.2f}" for r in results]),
        ("ping, p50 ms", [f"{r['ping_ms']:.2f}" for r in results]),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    return table
