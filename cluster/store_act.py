"""Commands that have the store do something: ``tracehaul store prefetch|scrub|drain|limits|bench``."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import typer

from cluster.config import parse_bytes
from cluster.members import Answers, ask, ask_own
from cluster.prompts import Source
from cluster.rundir import ClusterFault
from cluster.store_jobs import Job, Progressed, follow
from cluster.store_session import (
    DEFAULT_RUN_DIR,
    ChatOption,
    HashOption,
    JsonOption,
    NodeArgument,
    PromptOption,
    RunDirOption,
    SaltOption,
    Session,
    TokensOption,
    UrlOption,
    app,
    echo,
    end,
    err,
    out,
    show,
    told,
    with_nodes,
)
from cluster.store_tables import bench_table, drain_table, limit, limits_table, scrub_table
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.blocks import Drain, DrainState, Prefetch, PrefetchCancel, PrefetchPoll, PrefetchState
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.ids import NodeId
from tracehaul.wire.messages import Request
from tracehaul.wire.operations import (
    Describe,
    Description,
    Limits,
    Locate,
    Located,
    Scrub,
    ScrubCancel,
    ScrubPoll,
    ScrubState,
    SetLimits,
)

JOB_START_TIMEOUT_S = 10.0
BENCH_BYTES = 128 << 20


def _prefetch_progress(state: PrefetchState) -> Progressed:
    note = f"{state.missed} missed" if state.missed else ""
    return Progressed(state.done, state.blocks, state.state == "running", note, state.state == "unknown")


def _poll_prefetch(state: PrefetchState) -> Request:
    return PrefetchPoll(state.job)


def _cancel_prefetch(state: PrefetchState) -> Request:
    return PrefetchCancel(state.job)


PREFETCH = Job("prefetch", PrefetchState, _poll_prefetch, _cancel_prefetch, _prefetch_progress)


@app.command()
def prefetch(
    node: NodeArgument = None,
    prompt: PromptOption = None,
    chat: ChatOption = None,
    tokens: TokensOption = None,
    hashes: HashOption = None,
    salt: SaltOption = "",
    as_json: JsonOption = False,
    url: UrlOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Bring blocks from slower tiers to memory, and wait until they are there. Ctrl-C cancels it.

    Example:

      tracehaul store prefetch --prompt prompt.txt
    """
    source = Source(prompt, chat, tokens, hashes or (), salt)

    async def work(session: Session) -> Answers[PrefetchState]:
        wanted = session.blocks.hashes
        located = await ask(session.peers, session.refs, Locate(tuple(wanted)), Located)
        requests: dict[NodeId, Request] = {}
        for name, where in located.got.items():
            below = [any(held[i] for held in where.held.values()) for i in range(len(wanted))]
            chosen = [h for i, h in enumerate(wanted) if below[i] and not where.held["memory"][i]]
            if chosen:
                requests[name] = Prefetch(tuple(chosen))
        begun = await ask_own(session.peers, session.refs, requests, PrefetchState, JOB_START_TIMEOUT_S)
        ended = await follow(session.peers, session.refs, begun.got, PREFETCH, err)
        return Answers(ended.got, located.failed | begun.failed | ended.failed)

    answers = with_nodes(url, run_dir, node, work, source)
    if as_json:
        echo(answers.got, answers.failed)
    elif not answers.got and not answers.failed:
        out.print("Nothing to bring up: no node holds any of these below its memory only.", highlight=False)
    for name, state in answers.got.items() if not as_json else ():
        brought = f"{state.done - state.missed} of {state.blocks} blocks are in memory"
        out.print(f"{name}: {state.state}, {brought}", highlight=False)
    end(answers.failed)


def _scrub_progress(state: ScrubState) -> Progressed:
    bad = sum(tier.bad for tier in state.tiers)
    done, total = sum(tier.checked for tier in state.tiers), sum(tier.blocks for tier in state.tiers)
    return Progressed(done, total, state.state == "running", f"{bad} bad" if bad else "", state.state == "unknown")


def _poll_scrub(state: ScrubState) -> Request:
    return ScrubPoll(state.job)


def _cancel_scrub(state: ScrubState) -> Request:
    return ScrubCancel(state.job)


SCRUB = Job("scrub", ScrubState, _poll_scrub, _cancel_scrub, _scrub_progress)


@app.command()
def scrub(
    node: NodeArgument = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Verify every block in memory and on disk now; bad ones are dropped. Ctrl-C cancels it.

    One scrub runs on a node at a time: a second one watches the first.

    Example:

      tracehaul store scrub store-0
    """

    async def work(session: Session) -> Answers[ScrubState]:
        begun = await ask(session.peers, session.refs, Scrub(), ScrubState, JOB_START_TIMEOUT_S)
        ended = await follow(session.peers, session.refs, begun.got, SCRUB, err)
        return Answers(ended.got, begun.failed | ended.failed)

    answers = with_nodes(url, run_dir, node, work)
    told(answers, lambda: scrub_table(answers.got), as_json)


def _drain_progress(state: DrainState) -> Progressed:
    return Progressed(
        state.blocks_moved, state.blocks_moved + state.blocks_left, state.state == "draining", state.held_up
    )


def _poll_drain(state: DrainState) -> Request:
    return Drain()  # asking again says how far it is


DRAIN = Job("drain", DrainState, _poll_drain, None, _drain_progress)


@app.command()
def drain(
    node: Annotated[str, typer.Argument(help="The store node to empty, such as store-0.")],
    cancel: Annotated[bool, typer.Option("--cancel", help="Let it serve as before.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Move all that a node holds to the others, so that it can be stopped without losing anything.

    It takes nothing new and is read from until it is stopped. Ctrl-C only ends the watching: the drain goes on.

    Examples:

      tracehaul store drain store-1

      tracehaul store drain store-1 --cancel
    """

    async def work(session: Session) -> Answers[DrainState]:
        begun = await ask(session.peers, session.refs, Drain(cancel), DrainState, JOB_START_TIMEOUT_S)
        if cancel:
            return begun
        ended = await follow(session.peers, session.refs, begun.got, DRAIN, err)
        return Answers(ended.got, begun.failed | ended.failed)

    answers = with_nodes(url, run_dir, node, work)
    if not as_json and any(state.state == "drained" for state in answers.got.values()):
        out.print(f"{node} can be stopped: all that it holds is on other nodes too.", highlight=False)
    told(answers, lambda: drain_table(answers.got), as_json)


class Change(NamedTuple):
    """One ``NAME=VALUE``, or ``NAME.KEY=VALUE`` for one entry of a limit that has several."""

    name: str
    key: str | None
    value: int | float | None
    """None: the entry goes."""


def parse_change(text: str) -> Change:
    """A change as it is written on the command line; sizes may have units.

    Raises:
        ClusterFault: it is none.
    """
    name, equals, value = text.partition("=")
    name, _, key = name.strip().partition(".")
    value = value.strip()
    if not equals or not name or not value:
        raise ClusterFault(f"not NAME=VALUE: {text!r}; for example --set leases_max=2048")
    if key and value == "none":
        return Change(name, key, None)
    try:
        if name.endswith(("_bytes", "_bytes_s")):
            return Change(name, key or None, parse_bytes(value))
        number = float(value)
        whole = number.is_integer() and not set(value) & set(".eE")
        return Change(name, key or None, int(value) if whole else number)
    except ValueError as error:
        raise ClusterFault(f"{name}: {error}") from None


def changes_for(limits: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """What to send to a node whose limits are ``limits``: of a limit with several entries the others stay."""
    wanted: dict[str, Any] = {}
    for change in changes:
        if change.key is None:
            wanted[change.name] = change.value
            continue
        before: Any = wanted.get(change.name, limits.get(change.name))
        entries: dict[str, Any] = dict(before) if isinstance(before, Mapping) else {}
        entries.pop(change.key, None)
        if change.value is not None:
            entries[change.key] = change.value
        wanted[change.name] = entries
    return wanted


@app.command()
def limits(
    node: NodeArgument = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a limit now; may be repeated: all or none."),
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Show the nodes' limits, or change some while they serve.

    Each node takes all changes or none. They hold until the node restarts: what is to stay belongs in the config.

    Examples:

      tracehaul store limits

      tracehaul store limits store-0 --set leases_max=2048 --set scrub_bytes_s=8MiB

      tracehaul store limits --set quota_bytes.alice=512MiB --set quota_bytes.bob=none
    """
    parsed = [parse_change(text) for text in changes or ()]

    async def work(session: Session) -> tuple[Answers[Description], Answers[Limits]]:
        shown = await ask(session.peers, session.refs, Describe(), Description)
        if not parsed:
            return shown, Answers({}, {})
        requests = {name: SetLimits(changes_for(d.limits, parsed)) for name, d in shown.got.items()}
        return shown, await ask_own(session.peers, session.refs, requests, Limits)

    shown, told = with_nodes(url, run_dir, node, work)
    failed = shown.failed | told.failed
    if as_json:
        now = {name: description.limits for name, description in shown.got.items()}
        echo(now | {name: reply.limits for name, reply in told.got.items()}, failed)
    elif not parsed and shown.got:
        show(limits_table(shown.got))
    for name, reply in told.got.items() if not as_json else ():
        before = shown.got[name].limits
        for key in dict.fromkeys(change.name for change in parsed):
            old, new = limit(key, before.get(key)), limit(key, reply.limits.get(key))
            out.print(f"{name}: {key} {old} -> {new}, until it restarts", highlight=False, markup=False)
    end(failed)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def bench(
    node: NodeArgument = None,
    nbytes: Annotated[
        int | None,
        typer.Option("--bytes", parser=_size, metavar="SIZE", help="At most so much of a node's free memory: 128MiB."),
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Time puts, gets and lookups on each node in turn, in its free slots only: nothing stored gives way.

    The blocks are a tenant's of their own, a few at a time, and are thrown away when they have been read.

    Example:

      tracehaul store bench store-0 --bytes 64MiB
    """
    from cluster.store_bench import BenchResult
    from cluster.store_bench import bench as measure

    async def work(session: Session) -> Answers[BenchResult]:
        answers: Answers[BenchResult] = Answers({}, {})
        for ref in session.refs:
            reached = await ask(session.peers, [ref], Ping(), Ok)
            answers.failed.update(reached.failed)
            if ref.node in reached.got:
                try:
                    answers.got[ref.node] = await measure(ref, nbytes or BENCH_BYTES)
                except ClusterError as error:
                    answers.failed[ref.node] = f"was not measured: {error}"
        return answers

    answers = with_nodes(url, run_dir, node, work)
    told(answers, lambda: bench_table({n: msgspec.structs.asdict(r) for n, r in answers.got.items()}), as_json)
