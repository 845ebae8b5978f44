"""What both ends of a connection share, over an abstract pipe of frames.

TCP and the in-process network differ only in their pipes, so the contract of :mod:`tracehaul.rpc.base` is
implemented once: here, in :mod:`tracehaul.rpc.calling` and in :mod:`tracehaul.rpc.serving`.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import msgspec

from tracehaul.rpc.frames import FRAME_BYTES_MAX, Frame, Hello, check_hello
from tracehaul.runtime.log import Log
from tracehaul.wire.errors import ClusterError, PeerLost, ProtocolError

log = Log(__name__)


class Limits(msgspec.Struct, frozen=True):
    """Bounds on what a peer can make this process hold or wait for."""

    frame_bytes_max: int = FRAME_BYTES_MAX
    connections_max: int = 1024
    """Per server; further ones are closed at once."""
    handlers_max: int = 4096
    """Running calls and streams per connection; further ones fail with Overloaded."""
    stream_items_max: int = 16_384
    """Replies that one stream holds for a consumer that does not take them: more is Overloaded.

    One read from a socket can bring thousands of small ones before the fastest consumer runs.
    """
    stall_s: float = 30.0
    """A peer that takes no bytes for so long, with a full send buffer, is cut off."""
    hello_s: float = 5.0
    """A client that has not introduced itself by then is cut off."""
    alive_s: float = 1.0
    """How often a server proves that its open streams live."""


DEFAULT_LIMITS = Limits()


class Pipe(Protocol):
    """Carries frames to the peer, in order; reports to a :class:`Session`.

    It calls ``received`` with frames, ``lost`` once at its end (never from inside a call into the pipe), and
    ``pause_writing`` / ``resume_writing`` around times in which its send buffer is full.
    """

    def send(self, frame: Frame) -> None:
        """Queue a frame; after the end this does nothing.

        Raises:
            ProtocolError: the frame is over the size limit; nothing was sent.
        """
        ...

    def close(self) -> None:
        """Send what is queued if the peer takes it at once, then end."""
        ...


class Session(ABC):
    """One end of one connection: the greeting, the send gate, the end."""

    def __init__(self, pipe: Pipe, limits: Limits) -> None:
        self._pipe = pipe
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._greeted = False
        self._ended: ClusterError | None = None
        self._gone = asyncio.Event()
        self._gate: asyncio.Event | None = None
        """Present while the send buffer is full; set when it is not, or never will be."""
        self._stall: asyncio.TimerHandle | None = None
        pipe.send(Hello())

    @property
    def closed(self) -> bool:
        """True once the connection is lost or closed."""
        return self._ended is not None

    def received(self, frames: Sequence[Frame]) -> None:
        """The pipe delivers frames. What breaks the protocol ends the connection."""
        try:
            for frame in frames:
                if self._ended is not None:
                    return
                if self._greeted:
                    self._handle(frame)
                else:
                    check_hello(frame)
                    self._greeted = True
                    self._on_greeted()
        except ProtocolError as error:
            self.violated(error)

    def violated(self, error: ProtocolError) -> None:
        """The peer broke the protocol: end the connection."""
        log.warning("peer broke the protocol", reason=error)
        self._end(error)

    def lost(self, reason: PeerLost) -> None:
        """The pipe reports its end."""
        self._end(reason)
        self._gone.set()

    def pause_writing(self) -> None:
        """The pipe's send buffer is full."""
        if self._gate is None and not self.closed:
            self._gate = asyncio.Event()
            self._stall = self._loop.call_later(self._limits.stall_s, self._stalled)

    def resume_writing(self) -> None:
        """The pipe's send buffer has room again."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        if self._gate is not None:
            self._gate.set()
            self._gate = None

    async def close(self) -> None:
        """End the connection and wait for the pipe's end."""
        self._end(PeerLost("connection closed by this node"))
        await self._gone.wait()

    async def _writable(self) -> None:
        """Wait for room in the send buffer: bounded, since a stalled connection is cut off.

        Raises:
            PeerLost: the connection ended.
        """
        while self._gate is not None:
            await self._gate.wait()
        if self._ended is not None:
            raise lost_error(self._ended)

    def _stalled(self) -> None:
        self._end(PeerLost(f"peer took no bytes for {self._limits.stall_s:g} s"))

    def _end(self, error: ClusterError) -> None:
        if self._ended is None:
            self._ended = error
            self.resume_writing()
            self._pipe.close()
            self._on_end(error)

    @abstractmethod
    def _handle(self, frame: Frame) -> None:
        """Act on a frame after the greeting; raises ProtocolError for one that this end never gets."""

    @abstractmethod
    def _on_greeted(self) -> None:
        """The peer's Hello was good."""

    @abstractmethod
    def _on_end(self, error: ClusterError) -> None:
        """The connection is over; called once."""


def lost_error(reason: ClusterError) -> PeerLost:
    """What a call that was under way raises when its connection ends for ``reason``."""
    return PeerLost(str(reason))
