"""Commands that look at the store: ``tracehaul store ping|describe|tiers|query|pins``, and pins by hand."""

import asyncio
from typing import Annotated

import msgspec
import typer

from cluster.members import Answers, StoreRef, ask, ask_own
from cluster.prompts import Blocks, Source
from cluster.rundir import ClusterFault
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
    TenantOption,
    TokensOption,
    UrlOption,
    app,
    echo,
    end,
    out,
    show,
    told,
    with_nodes,
)
from cluster.store_tables import (
    describe_table,
    hashes_table,
    holding,
    ping_table,
    pins_table,
    query_table,
    ranges,
    tiers_table,
)
from tracehaul.runtime import clock
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.blocks import ListPins, Pin, PinKind, PinList, Pinned, TierList, Tiers, Unpin
from tracehaul.wire.ids import NodeId, TraceId
from tracehaul.wire.operations import Describe, Description, Locate, Located


@app.command()
def ping(
    node: NodeArgument = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="Round trips to each.")] = 10,
    as_json: JsonOption = False,
    url: UrlOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Time the round trip to each node.

    Example:

      tracehaul store ping
    """

    async def one(session: Session, ref: StoreRef) -> tuple[list[float], dict[NodeId, str]]:
        times: list[float] = []
        for _ in range(count + 1):
            began_s = clock.perf_s()
            answers = await ask(session.peers, [ref], Ping(), Ok)
            if answers.failed:
                return times[1:], answers.failed
            times.append(clock.perf_s() - began_s)
        return times[1:], {}  # the first also made the connection

    async def work(session: Session) -> tuple[list[StoreRef], dict[NodeId, list[float]], dict[NodeId, str]]:
        outcomes = await asyncio.gather(*(one(session, ref) for ref in session.refs))
        times = {ref.node: taken for ref, (taken, _) in zip(session.refs, outcomes, strict=True) if taken}
        return session.refs, times, {node: why for _, failed in outcomes for node, why in failed.items()}

    refs, times, failed = with_nodes(url, run_dir, node, work)
    if as_json:
        states = {ref.node: ref.state for ref in refs}
        echo({name: {"state": states[name], "round_trips_s": taken} for name, taken in times.items()}, failed)
    else:
        show(ping_table(refs, times))
    end(failed)


@app.command()
def describe(
    node: NodeArgument = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Show what each node is and how full: slots, leases, pins, tenants' usage, counters.

    Its limits are shown by `tracehaul store limits`, and with --json by this command too.

    Example:

      tracehaul store describe store-0
    """

    async def work(session: Session) -> tuple[list[StoreRef], Answers[Description]]:
        return session.refs, await ask(session.peers, session.refs, Describe(), Description)

    refs, answers = with_nodes(url, run_dir, node, work)
    told(answers, lambda: describe_table(refs, answers.got), as_json)


@app.command()
def tiers(
    node: NodeArgument = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Show what each node holds in memory and below it, and what moved.

    Example:

      tracehaul store tiers
    """

    async def work(session: Session) -> Answers[TierList]:
        return await ask(session.peers, session.refs, Tiers(), TierList)

    answers = with_nodes(url, run_dir, node, work)
    told(answers, lambda: tiers_table({n: reply.tiers for n, reply in answers.got.items()}), as_json)


@app.command()
def query(
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
    """Show which blocks of a prompt are held, by which node, in which tier.

    What counts for a step is the leading run. A conversation's earlier answers may be cut into other tokens by its
    text than they were generated with; then the run ends there, though a trace's next step finds more.

    Examples:

      tracehaul store query --prompt prompt.txt

      tracehaul store query store-0 --hash 00112233445566778899aabbccddeeff
    """
    source = Source(prompt, chat, tokens, hashes or (), salt)

    async def work(session: Session) -> tuple[Blocks, Answers[Located]]:
        blocks = session.blocks
        return blocks, await ask(session.peers, session.refs, Locate(tuple(blocks.hashes)), Located)

    blocks, answers = with_nodes(url, run_dir, node, work, source)
    count = len(blocks.hashes)
    if as_json:
        shown = {
            name: {
                **msgspec.structs.asdict(holding([located], count)),
                "blocks": count,
                "ranges": ranges(located, count),
            }
            for name, located in answers.got.items()
        }
        echo(shown, answers.failed)
    elif answers.got and not blocks.block_tokens:
        show(hashes_table(answers.got, blocks.hashes))
    elif answers.got:
        run = holding(answers.got.values(), count).run
        whole = f"{blocks.tokens} tokens, {count} full blocks of {blocks.block_tokens}"
        out.print(f"{whole}; leading run {run} blocks, {run * blocks.block_tokens} tokens", highlight=False)
        show(query_table(answers.got, count))
    end(answers.failed)


@app.command()
def pins(
    node: NodeArgument = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's. Default: everybody's.")] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """List open pins, the first to end first.

    Example:

      tracehaul store pins
    """

    async def work(session: Session) -> Answers[PinList]:
        return await ask(session.peers, session.refs, ListPins(tenant), PinList)

    answers = with_nodes(url, run_dir, node, work)
    told(answers, lambda: pins_table({n: reply.pins for n, reply in answers.got.items()}), as_json)


@app.command()
def pin(
    trace: Annotated[str, typer.Argument(help="The trace that the pin belongs to.")],
    node: NodeArgument = None,
    prompt: PromptOption = None,
    chat: ChatOption = None,
    tokens: TokensOption = None,
    hashes: HashOption = None,
    salt: SaltOption = "",
    ttl_s: Annotated[float, typer.Option("--ttl", help="Seconds; the node caps it.")] = 600.0,
    hard: Annotated[bool, typer.Option("--hard", help="Never evicted, rather than late.")] = False,
    tenant: TenantOption = "",
    url: UrlOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """Pin a trace's blocks by hand, on the nodes that hold some of them.

    Example:

      tracehaul store pin my-agent-1 --prompt prompt.txt --ttl 3600 --hard
    """
    source = Source(prompt, chat, tokens, hashes or (), salt)
    kind: PinKind = "hard" if hard else "soft"

    async def work(session: Session) -> Answers[Pinned]:
        wanted = tuple(session.blocks.hashes)
        located = await ask(session.peers, session.refs, Locate(wanted), Located)
        request = Pin(TraceId(trace), wanted, ttl_s, kind, tenant=tenant)
        holders = {n: request for n, where in located.got.items() if holding([where], len(wanted)).held}
        if not holders and not located.failed:
            raise ClusterFault("no node holds any of these blocks: nothing to pin")
        pinned = await ask_own(session.peers, session.refs, holders, Pinned)
        return Answers(pinned.got, located.failed | pinned.failed)

    answers = with_nodes(url, run_dir, node, work, source)
    for name, pinned in answers.got.items():
        covers = f"{pinned.blocks} blocks, {pinned.held} of them held, for {pinned.remaining_s:.0f} s"
        out.print(f"{name}: {trace} pins {covers}", highlight=False, markup=False)
    end(answers.failed)


@app.command()
def unpin(
    trace: Annotated[str, typer.Argument(help="The trace whose pin ends.")],
    node: NodeArgument = None,
    tenant: TenantOption = "",
    url: UrlOption = None,
    run_dir: RunDirOption = DEFAULT_RUN_DIR,
) -> None:
    """End a trace's pin on each node; harmless where there is none.

    Example:

      tracehaul store unpin my-agent-1
    """

    async def work(session: Session) -> Answers[Ok]:
        return await ask(session.peers, session.refs, Unpin(TraceId(trace), tenant), Ok)

    end(with_nodes(url, run_dir, node, work).failed)
