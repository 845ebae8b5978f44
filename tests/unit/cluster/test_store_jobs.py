"""Watching jobs of store nodes: to their end, to a node's loss, or until Ctrl-C."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from io import StringIO

import pytest
from rich.console import Console

from cluster.asking import StoreRef
from cluster.store import jobs as store_jobs
from cluster.store.commands import DRAIN, SCRUB
from cluster.store.jobs import follow
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.peers import Peers
from tracehaul.wire.blocks import Drain, DrainState
from tracehaul.wire.errors import Unavailable
from tracehaul.wire.ids import NodeId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.operations import ScrubbedTier, ScrubCancel, ScrubPoll, ScrubState

S0, S1 = NodeId("store-0"), NodeId("store-1")


class Node:
    """Answers polls from a list, the last one for ever; an exception in it is raised."""

    def __init__(self, *replies: Reply | Exception) -> None:
        self.replies = list(replies)
        self.heard: list[Request] = []

    async def call(self, request: Request, context: CallContext) -> Reply:
        self.heard.append(request)
        reply = self.replies[0] if len(self.replies) == 1 else self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def polled(self, times: int) -> None:
        while len(self.heard) < times:  # noqa: ASYNC110 - polls a counter
            await asyncio.sleep(0.001)

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        raise AssertionError
        yield

    def disconnected(self, peer: str) -> None:
        pass


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_jobs, "POLL_S", 0.001)
    monkeypatch.setattr(store_jobs, "LINE_S", 0.0)


def play(case: Callable[[Peers, list[StoreRef], Console], Awaitable[None]], *nodes: Node) -> str:
    """What was shown meanwhile."""
    console = Console(file=StringIO(), width=120)

    async def main() -> None:
        network = LocalNetwork()
        peers = Peers(network)
        refs: list[StoreRef] = []
        for number, node in enumerate(nodes):
            server = await network.listen(f"s{number}:1", node)
            refs.append(StoreRef(NodeId(f"store-{number}"), "ready", server.address))
        async with asyncio.timeout(10):
            await case(peers, refs, console)
        await peers.close()

    asyncio.run(main())
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def scrub(state: str, checked: int, bad: int = 0) -> ScrubState:
    return ScrubState(1, state, (ScrubbedTier("memory", 10, checked, bad),))  # type: ignore[arg-type]


def test_jobs_are_watched_to_their_ends():
    quick, slow = Node(scrub("done", 10)), Node(scrub("running", 3, 1), scrub("running", 6, 1), scrub("done", 10, 1))

    async def case(peers: Peers, refs: list[StoreRef], console: Console) -> None:
        answers = await follow(peers, refs, {S0: scrub("running", 0), S1: scrub("running", 0)}, SCRUB, console)
        assert answers.got == {S0: scrub("done", 10), S1: scrub("done", 10, 1)}
        assert answers.failed == {}

    shown = play(case, quick, slow)
    assert "scrub store-1: 6 of 10 1 bad" in shown
    assert quick.heard == [ScrubPoll(1)]


def test_a_node_that_fails_or_forgets_is_given_up_and_the_others_go_on():
    lost, forgetful = Node(Unavailable("no")), Node(ScrubState(1, "unknown"))

    async def case(peers: Peers, refs: list[StoreRef], console: Console) -> None:
        begun = {S0: scrub("running", 0), S1: scrub("running", 0)}
        answers = await follow(peers, refs, begun, SCRUB, console)
        assert answers.got == {}
        assert answers.failed == {
            S0: "answers with an error: no",
            S1: "has forgotten the scrub: it was restarted meanwhile",
        }

    play(case, lost, forgetful)


def test_whoever_stops_watching_cancels_the_job():
    node = Node(scrub("running", 1))

    async def case(peers: Peers, refs: list[StoreRef], console: Console) -> None:
        watching = asyncio.create_task(follow(peers, refs, {S0: scrub("running", 0)}, SCRUB, console))
        await node.polled(3)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching

    assert "Cancelled the scrub on store-0." in play(case, node)
    assert node.heard[-1] == ScrubCancel(1)


def test_a_drain_goes_on_when_nobody_watches():
    node = Node(DrainState("draining", blocks_left=5, blocks_moved=3, held_up="nobody has room"))

    async def case(peers: Peers, refs: list[StoreRef], console: Console) -> None:
        watching = asyncio.create_task(follow(peers, refs, {S0: DrainState("draining")}, DRAIN, console))
        await node.polled(3)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching

    shown = play(case, node)
    assert "drain store-0: 3 of 8 nobody has room" in shown
    assert "The drain goes on." in shown
    assert set(node.heard) == {Drain()}
