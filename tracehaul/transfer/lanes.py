"""Whose turn it is: how the transfers of this process with one peer share the way there.

What is under way to a peer is served in order, so a small transfer waits for all that was launched before it. How
much that is is chosen here: much, to keep the wire busy at little cost, while large transfers are alone; little, for
a while, once a small one had to share the way with others.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from tracehaul.transfer.base import Copy
from tracehaul.transfer.notes import AgentPayload
from tracehaul.wire.errors import TransferError

CHUNK_BYTES = 8 << 20
LANE_BYTES = 16 << 20
"""Above it no further chunk is launched."""
SHARED_CHUNK_BYTES = 2 << 20
SHARED_LANE_BYTES = 6 << 20
"""The same while the way is shared."""
SHARED_S = 1.0
"""How long after a small transfer met others another one is expected."""
CHUNK_COPIES = 1024
LANE_CHUNKS = 32

Way = Literal["read", "write", "pull"]
"""One-sided read, one-sided write, or asking the owner to write."""
Over = Callable[[TransferError | None], None]
"""Called once when something is over, with what went wrong."""


class Cutter:
    """Cuts copies, in order, into lists of limited size; empty copies are left out."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._left = deque([copy for copy in copies if copy.nbytes])

    @property
    def empty(self) -> bool:
        """Whether nothing is left."""
        return not self._left

    def take(self, nbytes_max: int, copies_max: int) -> list[Copy]:
        """The next list: at most that many bytes and copies, and as much as that if so much is left."""
        taken: list[Copy] = []
        while self._left and nbytes_max and len(taken) < copies_max:
            local_offset, remote_offset, nbytes = self._left.popleft()
            size = min(nbytes, nbytes_max)
            taken.append(Copy(local_offset, remote_offset, size))
            nbytes_max -= size
            if size < nbytes:
                self._left.appendleft(Copy(local_offset + size, remote_offset + size, nbytes - size))
        return taken


class Movement:
    """One transfer: launched in chunks, over when nothing of it is left or under way."""

    def __init__(
        self, way: Way, peer: str, theirs: AgentPayload, ours: AgentPayload, copies: Sequence[Copy], over: Over
    ):
        self.way: Way = way
        self.peer = peer
        self.theirs = theirs
        self.ours = ours
        self.nbytes = sum(copy.nbytes for copy in copies)
        self.left = Cutter(copies)
        self.over = over
        self.under_way = 0
        self.error: TransferError | None = None


class Lane:
    """Our transfers with one peer: what is under way, and those with something left, the next one first."""

    def __init__(self) -> None:
        self._waiting: deque[Movement] = deque()
        self._shared_until_s = 0.0
        self.chunks = 0
        """Under way."""
        self.nbytes = 0
        """Under way."""

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is under way."""
        return not self._waiting and not self.chunks

    def enter(self, movement: Movement, now_s: float) -> None:
        """Have a transfer take its turns."""
        if movement.nbytes <= SHARED_CHUNK_BYTES and not self.idle:
            self._shared_until_s = now_s + SHARED_S
        self._waiting.append(movement)

    def leave(self, movement: Movement) -> None:
        """Launch no more of it; harmless if it has nothing left."""
        if movement in self._waiting:
            self._waiting.remove(movement)

    def leave_all(self) -> list[Movement]:
        """Launch no more of any; those that had something left."""
        left, self._waiting = list(self._waiting), deque()
        return left

    def next_chunk(self, now_s: float) -> tuple[Movement, list[Copy]] | None:
        """What to launch now, if there is room and something left; it counts as under way until :meth:`ended`."""
        shared = now_s < self._shared_until_s
        lane_bytes, chunk_bytes = (SHARED_LANE_BYTES, SHARED_CHUNK_BYTES) if shared else (LANE_BYTES, CHUNK_BYTES)
        if not self._waiting or self.nbytes >= lane_bytes or self.chunks >= LANE_CHUNKS:
            return None
        movement = self._waiting.popleft()
        chunk = movement.left.take(chunk_bytes, CHUNK_COPIES)
        if not movement.left.empty:
            self._waiting.append(movement)
        self.chunks += 1
        self.nbytes += sum(copy.nbytes for copy in chunk)
        return movement, chunk

    def ended(self, nbytes: int) -> None:
        """A chunk is under way no more."""
        self.chunks -= 1
        self.nbytes -= nbytes
