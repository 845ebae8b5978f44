"""The bookkeeping of a transport whose agent is polled (NIXL, UCXX): what is under way, with whom, and when it is over.

No threads, no asyncio and no library here: :class:`Exchange` is driven by one thread (see :mod:`.poller`), which also
hands it the time, through an :class:`Agent`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, Protocol

import msgspec
import numpy as np

from tracehaul.transfer import notes
from tracehaul.transfer.base import Copy
from tracehaul.transfer.lanes import Lane, Movement, Over
from tracehaul.transfer.notes import AgentPayload, Probe, PullDone, PullFailed, PullRequest, Triples
from tracehaul.wire.errors import TransferError, TransferLost

SERVED_MAX = 512
SERVED_PER_PEER_MAX = 64
"""Pulls of peers served at once, in all and for one peer (which may be frozen, and hold them for ever)."""
PEERS_MAX = 1024
METADATA_MAX = 64
"""Versions of one peer's metadata remembered as loaded; loading one again is harmless."""
PROBE_S = 0.1
GRACE_S = 0.05
"""Between losing a connection and calling its transfers lost: what had arrived by then is landed by then."""

Waking = Literal["armed", "busy", "unknown"]
"""Whether an agent's descriptors will tell of the next event: they will; there is something to do now; or there is no
telling, so look again after a nap."""


class NameTaken(TransferError):
    """Another peer is known by that name."""


class Agent(Protocol):
    """The few things that an agent does for us. Raises TransferLost for a broken connection, else TransferError."""

    @property
    def wake_fds(self) -> Sequence[int]:
        """Descriptors that become readable when it may be worth looking; none if there is no telling."""
        ...

    def arm(self) -> Waking:
        """Make ``wake_fds`` tell of the next event, where that can be done."""
        ...

    def register(self, address: int, nbytes: int) -> bytes:
        """Register memory of this process; the metadata that peers need to reach all that is registered."""
        ...

    def add_peer(self, name: str, metadata: bytes) -> None:
        """Make a peer reachable, or learn what it has registered since.

        Raises NameTaken, and leaves the known one as it was, if another peer is known by that name.
        """
        ...

    def remove_peer(self, name: str) -> None:
        """Disconnect and forget; harmless if unknown."""
        ...

    def post(self, way: Literal["read", "write"], peer: str, ours: Triples, theirs: Triples, note: bytes) -> int:
        """Start moving bytes; ``note``, if not empty, reaches the peer after them. Returns a handle."""
        ...

    def poll(self, handle: int) -> bool:
        """Whether it is done. After raising, it is over, too."""
        ...

    def release(self, handle: int) -> None:
        """Free a handle. This does not cancel anything."""
        ...

    def notify(self, peer: str, note: bytes) -> None:
        """Send a notification."""
        ...

    def heard(self) -> list[tuple[str, bytes]]:
        """Notifications since the last call, with their senders. Also where an agent without a thread of its own
        does its work."""
        ...

    def close(self) -> None:
        """Release everything. After this nothing moves, and nothing else may be called."""
        ...


class _Flight(msgspec.Struct, frozen=True):
    """Bytes that this side's agent is moving."""

    peer: str
    over: Over
    served: bool


class _Pull(msgspec.Struct, frozen=True):
    """A request that the owner has not answered yet."""

    peer: str
    over: Over


class _Grave(msgspec.Struct, frozen=True):
    """What was under way with a peer that is gone, until nothing of it can be on its way here any more."""

    until_s: float
    peer: str
    over: Over


class Exchange:
    """All transfers of one agent. Everything is called by one thread."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._regions: dict[int, AgentPayload] = {}
        self._peers: dict[str, set[bytes]] = {}
        self._movements: set[Movement] = set()
        self._lanes: dict[str, Lane] = {}
        self._flights: dict[int, _Flight] = {}
        self._pulls: dict[int, _Pull] = {}
        self._graves: list[_Grave] = []
        self._probe_at_s: dict[str, float] = {}
        self._last_id = 0
        self._now_s = 0.0
        self._closed = False
        self.dropped = 0
        """Notifications that made no sense."""
        self.refused = 0
        """Pull requests that were answered with a failure."""

    @property
    def wake_fds(self) -> Sequence[int]:
        """See :class:`Agent`."""
        return self._agent.wake_fds

    def arm(self) -> Waking:
        """See :class:`Agent`."""
        return self._agent.arm()

    def register(self, address: int, nbytes: int) -> AgentPayload:
        """Make memory of this process reachable, and serve pulls from it."""
        if self._closed:
            raise TransferLost("this side closed its transport")
        region = len(self._regions)
        metadata = self._agent.register(address, nbytes)
        self._regions[region] = notes.make_payload(metadata, region, address, nbytes)
        return self._regions[region]

    def start(self, movement: Movement, now_s: float) -> None:
        """Begin a transfer; its ``over`` is called when it has ended."""
        if self._closed:
            movement.over(TransferLost("this side closed its transport"))
            return
        self._now_s = now_s
        self._movements.add(movement)
        try:
            self._meet(movement.peer, movement.theirs.metadata)
        except TransferError as error:
            self._fail(movement, error)
            return
        if movement.left.empty:
            self._greet(movement)
            return
        self._lanes.setdefault(movement.peer, Lane()).enter(movement, now_s)
        self._launch_next(movement.peer)

    def give_up(self, movement: Movement) -> None:
        """Launch no more of it. What is under way ends in its own time, and only then is the transfer over."""
        if movement in self._movements:
            self._fail(movement, TransferLost(f"transfer with {movement.peer} was given up"))

    def step(self, now_s: float) -> bool:
        """Look once at everything under way; whether anything happened."""
        self._now_s = now_s
        heard = self._agent.heard()
        for peer, data in heard:
            self._hear(peer, data)
        ended = self._poll_flights()
        self._probe()
        buried = [grave for grave in self._graves if grave.until_s <= now_s]
        if buried:
            self._graves = [grave for grave in self._graves if grave.until_s > now_s]
        for grave in buried:
            grave.over(TransferLost(f"{grave.peer} is gone"))
        return bool(heard or ended or buried)

    def close(self, reason: TransferError) -> None:
        """Destroy the agent; nothing moves any more, so every transfer ends."""
        self._closed = True
        for handle in self._flights:
            self._agent.release(handle)
        for peer in list(self._peers):
            self._forget(peer)
        self._agent.close()
        movements, self._movements = self._movements, set()
        self._lanes.clear()
        self._flights.clear()
        self._pulls.clear()
        self._graves.clear()
        for movement in movements:
            movement.over(reason)

    # --- our transfers

    def _greet(self, movement: Movement) -> None:
        """Ask for nothing: once it is answered, both sides know each other and have connections both ways."""
        movement.under_way += 1
        try:
            self._ask(movement, [], partial(self._greeted, movement))
        except TransferError as error:
            self._greeted(movement, error)
            if isinstance(error, TransferLost):
                self._lose(movement.peer)

    def _greeted(self, movement: Movement, error: TransferError | None) -> None:
        movement.under_way -= 1
        movement.error = movement.error or error
        self._end_if_idle(movement)

    def _ask(self, movement: Movement, chunk: list[Copy], over: Over) -> None:
        """Have the owner write."""
        self._last_id += 1
        request = PullRequest(self._last_id, movement.theirs.region, movement.ours, notes.pack_ranges(chunk))
        self._agent.notify(movement.peer, notes.pack(request))
        self._pulls[request.id] = _Pull(movement.peer, over)
        self._probe_at_s.setdefault(movement.peer, self._now_s + PROBE_S)

    def _launch_next(self, peer: str) -> None:
        """Launch what there is room for."""
        lane = self._lanes.get(peer)
        while lane is not None and (turn := lane.next_chunk(self._now_s)) is not None:
            movement, chunk = turn
            nbytes = sum(copy.nbytes for copy in chunk)
            movement.under_way += 1
            try:
                self._launch(movement, chunk, partial(self._chunk_over, movement, lane, nbytes))
            except TransferError as error:
                movement.under_way -= 1
                lane.ended(nbytes)
                self._fail(movement, error)
                if isinstance(error, TransferLost):
                    self._lose(peer)
        if lane is not None and lane.idle:
            self._lanes.pop(peer, None)

    def _fail(self, movement: Movement, error: TransferError) -> None:
        movement.error = movement.error or error
        lane = self._lanes.get(movement.peer)
        if lane is not None:
            lane.leave(movement)
        self._end_if_idle(movement)

    def _end_if_idle(self, movement: Movement) -> None:
        done = movement.left.empty or movement.error is not None
        if done and movement.under_way == 0 and movement in self._movements:
            self._movements.discard(movement)
            movement.over(movement.error)

    def _launch(self, movement: Movement, chunk: list[Copy], over: Over) -> None:
        if movement.way == "pull":
            self._ask(movement, chunk, over)
            return
        rows = np.asarray(chunk, dtype=np.uint64)
        ours = movement.ours.triples(rows[:, 0], rows[:, 2])
        theirs = movement.theirs.triples(rows[:, 1], rows[:, 2])
        handle = self._agent.post(movement.way, movement.peer, ours, theirs, b"")
        self._flights[handle] = _Flight(movement.peer, over, served=False)

    def _chunk_over(self, movement: Movement, lane: Lane, nbytes: int, error: TransferError | None) -> None:
        movement.under_way -= 1
        lane.ended(nbytes)
        if error is not None:
            self._fail(movement, error)
        else:
            self._end_if_idle(movement)
        self._launch_next(movement.peer)

    def _poll_flights(self) -> int:
        ended = 0
        for handle, flight in list(self._flights.items()):
            if handle not in self._flights:
                continue  # lost with the one before it
            error: TransferError | None = None
            try:
                if not self._agent.poll(handle):
                    continue
            except TransferLost:
                self._lose(flight.peer)
                ended += 1
                continue
            except TransferError as failure:
                error = failure
            ended += 1
            del self._flights[handle]
            self._agent.release(handle)
            flight.over(error)
        return ended

    # --- pulls that we asked for

    def _hear(self, peer: str, data: bytes) -> None:
        try:
            note = notes.unpack_note(data)
        except TransferError:
            self.dropped += 1
            return
        match note:
            case PullRequest():
                self._serve(peer, note)
            case PullDone(id=id):
                self._pull_over(peer, id, None)
            case PullFailed(id=id, reason=reason):
                self._pull_over(peer, id, TransferError(f"{peer} refused: {reason[:200]}"))
            case Probe():
                pass

    def _pull_over(self, peer: str, id: int, error: TransferError | None) -> None:
        pull = self._pulls.get(id)
        if pull is None or pull.peer != peer:
            self.dropped += 1
            return
        del self._pulls[id]
        pull.over(error)

    def _probe(self) -> None:
        """A requester has no handle to poll: that its owner is gone shows only when it is spoken to."""
        if not self._probe_at_s:
            return
        waited_for = {pull.peer for pull in self._pulls.values()}
        for peer, at_s in list(self._probe_at_s.items()):
            if peer not in waited_for:
                del self._probe_at_s[peer]
            elif at_s <= self._now_s:
                self._probe_at_s[peer] = self._now_s + PROBE_S
                try:
                    self._agent.notify(peer, notes.pack(Probe()))
                except TransferError:
                    self._lose(peer)

    # --- pulls that peers ask for

    def _serve(self, peer: str, request: PullRequest) -> None:
        try:
            region = self._regions.get(request.region)
            if region is None:
                raise TransferError(f"no region {request.region}")
            served = [flight.peer for flight in self._flights.values() if flight.served]
            if len(served) >= SERVED_MAX or served.count(peer) >= SERVED_PER_PEER_MAX:
                raise TransferError("too many pulls at once")
            if not request.ranges:
                self._admit(peer, request.into.metadata)
                self._agent.notify(peer, notes.pack(PullDone(request.id)))
                return
            rows = notes.unpack_ranges(request.ranges, request.into.nbytes, region.nbytes)
            ours = region.triples(rows[:, 1], rows[:, 2])
            theirs = request.into.triples(rows[:, 0], rows[:, 2])
            done = notes.pack(PullDone(request.id))
            self._admit(peer, request.into.metadata)
            try:
                handle = self._agent.post("write", peer, ours, theirs, done)
            except TransferLost:
                # The connection to an earlier time of this peer; it has just spoken, so make a new one.
                self._lose(peer)
                self._know(peer, request.into.metadata)
                handle = self._agent.post("write", peer, ours, theirs, done)
        except TransferError as error:
            self._refuse(peer, request, error)
            return
        over = partial(self._served, peer, request)
        self._flights[handle] = _Flight(peer, over, served=True)

    def _served(self, peer: str, request: PullRequest, error: TransferError | None) -> None:
        if error is not None:
            self._refuse(peer, request, error)

    def _refuse(self, peer: str, request: PullRequest, error: TransferError) -> None:
        self.refused += 1
        try:
            self._know(peer, request.into.metadata)
            self._agent.notify(peer, notes.pack(PullFailed(request.id, str(error)[:200])))
        except TransferError:
            self.dropped += 1  # it cannot be told; it will find out by its probe or its deadline

    # --- peers

    def _know(self, peer: str, metadata: bytes) -> None:
        """Load a peer's metadata, each version of it once."""
        loaded = self._peers.get(peer)
        if loaded is not None and metadata in loaded:
            return
        if loaded is None and len(self._peers) >= PEERS_MAX:
            self._forget(self._least_needed_peer())
        self._agent.add_peer(peer, metadata)
        versions = self._peers.setdefault(peer, set())
        if len(versions) >= METADATA_MAX:
            versions.clear()
        versions.add(metadata)

    def _admit(self, peer: str, metadata: bytes) -> None:
        """Load the metadata that came with a request. A name that another has is taken over only from the dead."""
        try:
            self._know(peer, metadata)
        except NameTaken:
            try:
                self._agent.notify(peer, notes.pack(Probe()))
            except TransferLost:
                self._lose(peer)
                self._know(peer, metadata)
                return
            raise

    def _meet(self, peer: str, metadata: bytes) -> None:
        """Load the metadata of a peer that our side chose to talk to: the control plane vouches for who it is.

        A name that only a request on the data plane claimed is taken from whoever claimed it; the other way round,
        in :meth:`_admit`, a claim never disturbs a living peer that is known by that name.
        """
        try:
            self._know(peer, metadata)
        except NameTaken:
            self._lose(peer)
            self._know(peer, metadata)

    def _least_needed_peer(self) -> str:
        busy = {flight.peer for flight in self._flights.values()} | {pull.peer for pull in self._pulls.values()}
        for peer in self._peers:
            if peer not in busy:
                return peer
        raise TransferError(f"transfers with {PEERS_MAX} peers at once; no more")

    def _lose(self, peer: str) -> None:
        """The connection is broken: nothing more comes or goes, and nothing that was asked for is answered."""
        until_s = self._now_s + GRACE_S
        for id in [id for id, pull in self._pulls.items() if pull.peer == peer]:
            self._graves.append(_Grave(until_s, peer, self._pulls.pop(id).over))
        for handle in [handle for handle, flight in self._flights.items() if flight.peer == peer]:
            self._agent.release(handle)
            self._graves.append(_Grave(until_s, peer, self._flights.pop(handle).over))
        self._forget(peer)
        lane = self._lanes.get(peer)
        for movement in lane.leave_all() if lane is not None else []:
            self._fail(movement, TransferLost(f"{peer} is gone"))

    def _forget(self, peer: str) -> None:
        self._peers.pop(peer, None)
        self._probe_at_s.pop(peer, None)
        self._agent.remove_peer(peer)
