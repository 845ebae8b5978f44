"""The store nodes of a running cluster, as an operator finds them, and one question to each of them."""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

import httpx
import msgspec

from cluster.api import Api, here
from cluster.plan import Plan, load_plan
from cluster.rundir import ClusterFault, RunDir, alive
from router.fleet.members import NodeStatus
from tracehaul.rpc.peers import Peers
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import ClusterError, InvalidRequest, PeerLost, TimedOut
from tracehaul.wire.ids import NodeId
from tracehaul.wire.messages import Reply, Request

STATUS_TIMEOUT_S = 5.0
ASK_TIMEOUT_S = 3.0
"""A node that has not answered a question by then is frozen, cut off, or far too busy."""

R = TypeVar("R", bound=Reply)
A = TypeVar("A")


class StoreRef(msgspec.Struct, frozen=True):
    """A store node and where it is."""

    node: NodeId
    state: str
    """``ready``, or what is the matter."""
    address: str = ""
    """``host:port`` of its control plane; empty if it has none now."""


class Found(NamedTuple):
    """A cluster."""

    stores: list[StoreRef]
    workers: list[NodeInfo]
    """Live ones: they know the KV layout."""
    plan: Plan | None
    """None if it was launched elsewhere."""
    run: RunDir | None
    router_lost: str | None = None
    """Why the router could not be asked, if the nodes were found without it."""

    def select(self, name: str | None) -> list[StoreRef]:
        """The node of that name, or all.

        Raises:
            ClusterFault: there is none.
        """
        chosen = [ref for ref in self.stores if name in (None, ref.node)]
        if chosen:
            return chosen
        names = ", ".join(ref.node for ref in self.stores) or "none at all"
        raise ClusterFault(f"no store node {name}; there are {names}" if name else "the cluster has no store node")


class Answers(NamedTuple, Generic[A]):
    """What came of asking several nodes."""

    got: dict[NodeId, A]
    failed: dict[NodeId, str]
    """Why there is no answer, and what to do."""


def ask_router(api: Api, hint: str) -> list[NodeStatus]:
    """Every member of the cluster with that API.

    Raises:
        ClusterFault: no router answers there; ends with ``hint``.
    """
    try:
        answer = api.get("/cluster", STATUS_TIMEOUT_S)
        answer.raise_for_status()
        return msgspec.json.decode(answer.content, type=list[NodeStatus])
    except ClusterFault as fault:
        raise ClusterFault(f"{fault}; {hint}") from fault
    except httpx.HTTPError as error:
        raise ClusterFault(f"no router answers at {api.url}: {error}; {hint}") from error
    except msgspec.DecodeError as error:
        raise ClusterFault(f"{api.url} answers, but not as a tracehaul router: {error}") from error


def find(url: str | None, run: RunDir, key: str | None = None) -> Found:
    """The cluster at ``url``, or the one that was started in ``run``, even if its router is silent. ``key``: for the
    one at ``url``.

    Raises:
        ClusterFault: there is none.
    """
    if url is not None:
        statuses = ask_router(Api(url, key), "is that the address of its HTTP API?")
        return Found(_stores(statuses), _workers(statuses), None, None)
    plan = load_plan(run)
    lost: str | None = None
    statuses: list[NodeStatus] = []
    try:
        statuses = ask_router(here(plan, run), f"its log is {run.log('router-0')}")
    except ClusterFault as fault:
        if not any(alive(record) for record in run.records()):  # also of a fleet: then nothing of it runs on this host
            raise ClusterFault(f"no node of the cluster in {run.path} runs; start one with: tracehaul up") from fault
        lost = str(fault)
    stores = {ref.node: ref for ref in _stores(statuses)}
    running = {record.name for record in run.records() if alive(record)}
    for spec in plan.nodes:
        if spec.role != "store":
            continue
        name = NodeId(spec.name)
        if spec.host:  # of a fleet, where files tell of this host's nodes alone
            stores.setdefault(name, StoreRef(name, "no member" if lost is None else "router silent", spec.control))
        elif spec.name not in running:
            stores[name] = StoreRef(name, "dead")
        elif name not in stores:
            state = run.state(spec.name)
            phase = state.phase if lost is None else "router silent"
            stores[name] = StoreRef(name, phase, state.address)
    return Found([stores[name] for name in sorted(stores)], _workers(statuses), plan, run, lost)


def _stores(statuses: Iterable[NodeStatus]) -> list[StoreRef]:
    refs: list[StoreRef] = []
    for status in statuses:
        if status.info.role == "store":
            silent = f"silent for {status.heartbeat_age_s:.0f} s"
            state = silent if status.health == "suspect" else status.health
            refs.append(StoreRef(status.info.node, state, status.info.address))
    return refs


def _workers(statuses: Iterable[NodeStatus]) -> list[NodeInfo]:
    return [status.info for status in statuses if status.info.root and status.health == "ready"]


async def ask(
    peers: Peers, refs: Iterable[StoreRef], request: Request, kind: type[R], timeout_s: float = ASK_TIMEOUT_S
) -> Answers[R]:
    """The same question to several nodes at once; see :func:`ask_own`."""
    refs = list(refs)
    return await ask_own(peers, refs, {ref.node: request for ref in refs}, kind, timeout_s)


async def ask_own(
    peers: Peers,
    refs: Iterable[StoreRef],
    requests: Mapping[NodeId, Request],
    kind: type[R],
    timeout_s: float = ASK_TIMEOUT_S,
) -> Answers[R]:
    """To each node that has one its own question, all at once; takes at most ``timeout_s``."""
    asked = [ref for ref in refs if ref.node in requests]
    outcomes = await asyncio.gather(*(_ask(peers, ref, requests[ref.node], kind, timeout_s) for ref in asked))
    answers: Answers[R] = Answers({}, {})
    for ref, outcome in zip(asked, outcomes, strict=True):
        if isinstance(outcome, str):
            answers.failed[ref.node] = outcome
        else:
            answers.got[ref.node] = outcome
    return answers


async def _ask(peers: Peers, ref: StoreRef, request: Request, kind: type[R], timeout_s: float) -> R | str:
    if not ref.address:
        return f"is {ref.state}; bring it back with: tracehaul restart {ref.node}"
    try:
        reply = await peers.call(ref.address, request, timeout_s=timeout_s)
    except TimedOut:
        return f"did not answer within {timeout_s:g} s ({ref.state}): it is frozen, cut off or far too busy"
    except PeerLost:
        return f"cannot be reached at {ref.address}: it died, restarts, or is of another version; see: tracehaul status"
    except InvalidRequest as error:
        return f"refuses: {error}"
    except ClusterError as error:
        return f"answers with an error: {error}"
    if not isinstance(reply, kind):
        return f"answered {type(request).__name__} with {type(reply).__name__}: it is of another version"
    return reply
