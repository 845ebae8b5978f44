"""The table of ``tracehaul store``'s commands, and how those work that take more than one question."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import typer
from rich.table import Table

from cluster.asking import Answers, StoreRef, ask
from cluster.rundir import ClusterFault, RunDir
from cluster.security.secrets import networks_here
from cluster.store import tables
from cluster.store.command import BLOCKS, Command, Session, err
from cluster.store.jobs import JobKind, Progressed, R, follow
from cluster.store.limits import changes_for
from cluster.store.tables import holding, limit, ranges
from tracehaul.runtime import clock
from tracehaul.wire import base, blocks, operations
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.ids import NodeId, TraceId
from tracehaul.wire.messages import Request

JOB_START_TIMEOUT_S = 10.0
BENCH_BYTES = 128 << 20

Shown = Iterable[Table | str]


async def _ping(session: Session) -> Answers[list[float]]:
    async def one(ref: StoreRef) -> tuple[list[float], dict[NodeId, str]]:
        times: list[float] = []
        for _ in range(session.args.count + 1):
            began_s = clock.perf_s()
            if failed := (await ask(session.peers, [ref], base.Ping(), base.Ok)).failed:
                return times[1:], failed
            times.append(clock.perf_s() - began_s)
        return times[1:], {}  # the first also made the connection

    outcomes = await asyncio.gather(*map(one, session.refs))
    times = {ref.node: taken for ref, (taken, _) in zip(session.refs, outcomes, strict=True) if taken}
    return Answers(times, {node: why for _, failed in outcomes for node, why in failed.items()})


def _pinged(session: Session, got: Mapping[NodeId, Sequence[float]]) -> Mapping[NodeId, Any]:
    return {r.node: {"state": r.state, "round_trips_s": got[r.node]} for r in session.refs if r.node in got}


async def _locate(session: Session) -> Answers[operations.Located]:
    return await session.ask(operations.Locate(tuple(session.blocks.hashes)), operations.Located)


def _located(session: Session, got: Mapping[NodeId, operations.Located]) -> Mapping[NodeId, Any]:
    count = len(session.blocks.hashes)

    def one(located: operations.Located) -> dict[str, Any]:
        held = msgspec.structs.asdict(holding([located], count))
        return held | {"blocks": count, "ranges": ranges(located, count)}

    return {name: one(located) for name, located in got.items()}


def _show_located(session: Session, answers: Answers[operations.Located]) -> Shown:
    asked, count = session.blocks, len(session.blocks.hashes)
    if answers.got and not asked.block_tokens:
        yield tables.hashes_table(answers.got, asked.hashes)
    elif answers.got:
        run = holding(answers.got.values(), count).run
        whole = f"{asked.tokens} tokens, {count} full blocks of {asked.block_tokens}"
        yield f"{whole}; leading run {run} blocks, {run * asked.block_tokens} tokens"
        yield tables.query_table(answers.got, count)


async def _pin(session: Session) -> Answers[blocks.Pinned]:
    args, wanted, located = session.args, tuple(session.blocks.hashes), await _locate(session)
    request = blocks.Pin(TraceId(args.trace), wanted, args.ttl_s, "hard" if args.hard else "soft", tenant=args.tenant)
    holders = {n: request for n, where in located.got.items() if holding([where], len(wanted)).held}
    if not holders and not located.failed:
        raise ClusterFault("no node holds any of these blocks: nothing to pin")
    pinned = await session.ask_own(holders, blocks.Pinned)
    return Answers(pinned.got, located.failed | pinned.failed)


def _show_pinned(session: Session, answers: Answers[blocks.Pinned]) -> Shown:
    for name, pinned in answers.got.items():
        covers = f"{pinned.blocks} blocks, {pinned.held} of them held, for {pinned.remaining_s:.0f} s"
        yield f"{name}: {session.args.trace} pins {covers}"


async def _watch(session: Session, begun: Answers[R], job: JobKind[R]) -> Answers[R]:
    ended = await follow(session.peers, session.refs, begun.got, job, err)
    return Answers(ended.got, begun.failed | ended.failed)


def _prefetched(state: blocks.PrefetchState) -> Progressed:
    note = f"{state.missed} missed" if state.missed else ""
    return Progressed(state.done, state.blocks, state.state == "running", note, state.state == "unknown")


PREFETCH: JobKind[blocks.PrefetchState] = JobKind(
    "prefetch",
    blocks.PrefetchState,
    lambda state: blocks.PrefetchPoll(state.job),
    lambda state: blocks.PrefetchCancel(state.job),
    _prefetched,
)


async def _prefetch(session: Session) -> Answers[blocks.PrefetchState]:
    wanted, located = session.blocks.hashes, await _locate(session)
    requests: dict[NodeId, Request] = {}
    for name, where in located.got.items():
        below = [any(held[i] for held in where.held.values()) for i in range(len(wanted))]
        if chosen := [h for i, h in enumerate(wanted) if below[i] and not where.held["memory"][i]]:
            requests[name] = blocks.Prefetch(tuple(chosen))
    begun = await session.ask_own(requests, blocks.PrefetchState, JOB_START_TIMEOUT_S)
    ended = await _watch(session, begun, PREFETCH)
    return Answers(ended.got, located.failed | ended.failed)


def _show_prefetched(session: Session, answers: Answers[blocks.PrefetchState]) -> Shown:
    if not answers.got and not answers.failed:
        yield "Nothing to bring up: no node holds any of these below its memory only."
    for name, state in answers.got.items():
        yield f"{name}: {state.state}, {state.done - state.missed} of {state.blocks} blocks are in memory"


def _scrubbed(state: operations.ScrubState) -> Progressed:
    bad = sum(tier.bad for tier in state.tiers)
    done, total = sum(tier.checked for tier in state.tiers), sum(tier.blocks for tier in state.tiers)
    return Progressed(done, total, state.state == "running", f"{bad} bad" if bad else "", state.state == "unknown")


SCRUB: JobKind[operations.ScrubState] = JobKind(
    "scrub",
    operations.ScrubState,
    lambda state: operations.ScrubPoll(state.job),
    lambda state: operations.ScrubCancel(state.job),
    _scrubbed,
)


async def _scrub(session: Session) -> Answers[operations.ScrubState]:
    begun = await session.ask(operations.Scrub(), operations.ScrubState, JOB_START_TIMEOUT_S)
    return await _watch(session, begun, SCRUB)


def _drained(state: blocks.DrainState) -> Progressed:
    total = state.blocks_moved + state.blocks_left
    return Progressed(state.blocks_moved, total, state.state == "draining", state.held_up)


# Asking again says how far it is.
DRAIN: JobKind[blocks.DrainState] = JobKind("drain", blocks.DrainState, lambda state: blocks.Drain(), None, _drained)


async def _drain(session: Session) -> Answers[blocks.DrainState]:
    begun = await session.ask(blocks.Drain(session.args.cancel), blocks.DrainState, JOB_START_TIMEOUT_S)
    return begun if session.args.cancel else await _watch(session, begun, DRAIN)


def _show_drained(session: Session, answers: Answers[blocks.DrainState]) -> Shown:
    if any(state.state == "drained" for state in answers.got.values()):
        yield f"{session.args.node} can be stopped: all that it holds is on other nodes too."
    if answers.got:
        yield tables.drain_table(answers.got)


LimitsNow = tuple[operations.Description, operations.Limits | None]
"""A node before, and its limits after; None: it was told nothing, or took nothing."""


async def _limits(session: Session) -> Answers[LimitsNow]:
    shown, changes = await session.ask(operations.Describe(), operations.Description), session.args.changes
    requests = {n: operations.SetLimits(changes_for(d.limits, changes)) for n, d in shown.got.items() if changes}
    told = await session.ask_own(requests, operations.Limits)
    return Answers({n: (d, told.got.get(n)) for n, d in shown.got.items()}, shown.failed | told.failed)


def _show_limits(session: Session, answers: Answers[LimitsNow]) -> Shown:
    changed = dict.fromkeys(change.name for change in session.args.changes or ())
    if answers.got and not changed:
        yield tables.limits_table({name: before for name, (before, _) in answers.got.items()})
    for name, (before, after) in answers.got.items():
        for key in changed if after is not None else ():
            old, new = (limit(key, one.limits.get(key)) for one in (before, after) if one is not None)
            yield f"{name}: {key} {old} -> {new}, until it restarts"


async def _bench(session: Session) -> Answers[Any]:
    from cluster.store.bench import bench

    answers: Answers[Any] = Answers({}, {})
    networks = networks_here(RunDir(session.args.run_dir))
    for ref in session.refs:
        reached = await ask(session.peers, [ref], base.Ping(), base.Ok)
        answers.failed.update(reached.failed)
        if ref.node in reached.got:
            try:
                answers.got[ref.node] = await bench(ref, session.args.nbytes or BENCH_BYTES, networks)
            except ClusterError as error:
                answers.failed[ref.node] = f"was not measured: {error}"
    return answers


def _show_benched(session: Session, answers: Answers[Any]) -> Shown:
    if answers.got:
        yield tables.bench_table({name: msgspec.structs.asdict(result) for name, result in answers.got.items()})


COMMANDS = [
    Command(
        "ping",
        "Time the round trip to each node.",
        ["ping"],
        _ping,
        lambda session, answers: [tables.ping_table(session.refs, answers.got)],
        ["node", "count", "as_json"],
        data=_pinged,
    ),
    Command(
        "describe",
        "Show what each node is and how full: slots, leases, pins, tenants' usage, counters.\n\n"
        "Its limits are shown by `tracehaul store limits`, and with --json by this command too.",
        ["describe store-0"],
        lambda session: session.ask(operations.Describe(), operations.Description),
        lambda session, answers: [tables.describe_table(session.refs, answers.got)] if answers.got else [],
    ),
    Command(
        "tiers",
        "Show what each node holds in memory and below it, and what moved.",
        ["tiers"],
        lambda session: session.ask(blocks.Tiers(), blocks.TierList),
        lambda session, answers: [tables.tiers_table(answers.got)] if answers.got else [],
    ),
    Command(
        "query",
        "Show which blocks of a prompt are held, by which node, in which tier.\n\n"
        "What counts for a step is the leading run. A conversation's earlier answers may be cut into other tokens by "
        "its\ntext than they were generated with; then the run ends there, though a trace's next step finds more.",
        ["query --prompt prompt.txt", "query store-0 --hash 00112233445566778899aabbccddeeff"],
        _locate,
        _show_located,
        ["node", *BLOCKS, "as_json"],
        data=_located,
    ),
    Command(
        "pins",
        "List open pins, the first to end first.",
        ["pins"],
        lambda session: session.ask(blocks.ListPins(session.args.only), blocks.PinList),
        lambda session, answers: [tables.pins_table(answers.got)] if answers.got else [],
        ["node", "only", "as_json"],
    ),
    Command(
        "pin",
        "Pin a trace's blocks by hand, on the nodes that hold some of them.",
        ["pin my-agent-1 --prompt prompt.txt --ttl 3600 --hard"],
        _pin,
        _show_pinned,
        ["trace", "node", *BLOCKS, "ttl_s", "hard", "tenant"],
        required={"trace": "The trace that the pin belongs to."},
    ),
    Command(
        "unpin",
        "End a trace's pin on each node; harmless where there is none.",
        ["unpin my-agent-1"],
        lambda session: session.ask(blocks.Unpin(TraceId(session.args.trace), session.args.tenant), base.Ok),
        lambda session, answers: [],
        ["trace", "node", "tenant"],
        required={"trace": "The trace whose pin ends."},
    ),
    Command(
        "prefetch",
        "Bring blocks from slower tiers to memory, and wait until they are there. Ctrl-C cancels it.",
        ["prefetch --prompt prompt.txt"],
        _prefetch,
        _show_prefetched,
        ["node", *BLOCKS, "as_json"],
    ),
    Command(
        "scrub",
        "Verify every block in memory and on disk now; bad ones are dropped. Ctrl-C cancels it.\n\n"
        "One scrub runs on a node at a time: a second one watches the first.",
        ["scrub store-0"],
        _scrub,
        lambda session, answers: [tables.scrub_table(answers.got)] if answers.got else [],
    ),
    Command(
        "drain",
        "Move all that a node holds to the others, so that it can be stopped without losing anything.\n\n"
        "It takes nothing new and is read from until it is stopped. Ctrl-C only ends the watching: the drain goes on.",
        ["drain store-1", "drain store-1 --cancel"],
        _drain,
        _show_drained,
        ["node", "cancel", "as_json"],
        required={"node": "The store node to empty, such as store-0."},
    ),
    Command(
        "limits",
        "Show the nodes' limits, or change some while they serve.\n\n"
        "Each node takes all changes or none. They hold until the node restarts: what is to stay belongs in the config.",
        [
            "limits",
            "limits store-0 --set leases_max=2048 --set scrub_bytes_s=8MiB",
            "limits --set quota_bytes.alice=512MiB --set quota_bytes.bob=none",
        ],
        _limits,
        _show_limits,
        ["node", "changes", "as_json"],
        data=lambda session, got: {name: (after or before).limits for name, (before, after) in got.items()},
    ),
    Command(
        "bench",
        "Time puts, gets and lookups on each node in turn, in its free slots only: nothing stored gives way.\n\n"
        "The blocks are a tenant's of their own, a few at a time, and are thrown away when they have been read.",
        ["bench store-0 --bytes 64MiB"],
        _bench,
        _show_benched,
        ["node", "nbytes", "as_json"],
    ),
]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Look at the KV store's nodes and tell them what to do, without stopping anything.",
)
for command in COMMANDS:
    command.register(app)


def register(to: typer.Typer) -> None:
    """Add them to the command line."""
    to.add_typer(app, name="store")
