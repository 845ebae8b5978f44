"""The server's end of a connection: runs one task per call or stream."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial

from tracehaul.rpc.base import CallContext, Service
from tracehaul.rpc.frames import Alive, Call, Cancel, End, Fail, Frame, Item, Open, Reply
from tracehaul.rpc.session import Limits, Pipe, Session
from tracehaul.runtime.log import Log
from tracehaul.wire.errors import ClusterError, Overloaded, PeerLost, ProtocolError, TimedOut

log = Log(__name__)

_HANDLERS_END_S = 5.0
"""How long a closing server waits for handlers that resist their cancellation."""
_BURST_ITEMS = 64
_MESSAGE_CHARS_MAX = 2000
"""An error's text is cut to this on the wire."""


class ServerSession(Session):
    """Serves one connection, named ``peer``, with ``service``; ``on_gone`` is called after its last handler ended.

    ``names``: who the peer is, if the connection proves it.
    """

    def __init__(
        self,
        pipe: Pipe,
        limits: Limits,
        service: Service,
        peer: str,
        on_gone: Callable[["ServerSession"], None],
        names: frozenset[str] | None = None,
    ) -> None:
        super().__init__(pipe, limits)
        self._service = service
        self._peer = peer
        self._on_gone = on_gone
        self._names = names
        self._last_id = 0
        self._wanted: dict[int, asyncio.Task[None]] = {}
        """Handlers whose outcome the client still waits for."""
        self._running = 0
        """All handlers, those being cancelled included."""
        self._finished = asyncio.Event()
        self._streams: dict[int, None] = {}
        """Open streams in order of arrival."""
        self._alive: asyncio.TimerHandle | None = None
        self._hello_timer = self._loop.call_later(limits.hello_s, self._on_no_hello)

    async def close(self) -> None:
        """End the connection; returns when all its handlers ended and the service was told."""
        await super().close()
        await self._finished.wait()

    def _handle(self, frame: Frame) -> None:
        match frame:
            case Call() | Open():
                self._start(frame)
            case Cancel(id=call_id):
                task = self._wanted.pop(call_id, None)  # None: its answer crossed the Cancel
                if task is not None:
                    self._streams.pop(call_id, None)
                    task.cancel()
            case _:
                raise ProtocolError(f"a client never sends {type(frame).__name__}")

    def _start(self, frame: Call | Open) -> None:
        if frame.id <= self._last_id:
            raise ProtocolError(f"call {frame.id} after call {self._last_id}")
        self._last_id = frame.id
        if self._running >= self._limits.handlers_max:
            if self._gate is not None:  # it asks without taking answers: even refusals would pile up
                self._end(PeerLost("peer takes no answers and asks for more"))
                return
            self._fail(frame.id, Overloaded(f"{self._running} calls run on this connection"))
            return
        self._running += 1
        task = self._wanted[frame.id] = self._loop.create_task(self._run(frame))
        task.add_done_callback(partial(self._on_done, frame.id))
        if isinstance(frame, Open):
            self._streams[frame.id] = None
            if self._alive is None:
                self._alive = self._loop.call_later(self._limits.alive_s, self._prove_life)

    async def _run(self, frame: Call | Open) -> None:
        try:
            if isinstance(frame, Call):
                await self._call(frame)
            else:
                await self._stream(frame)
        except asyncio.CancelledError:
            if frame.id in self._wanted:  # not by us: the handler awaited something that was cancelled
                self._fail(frame.id, ClusterError("the handler was cancelled"))
            raise
        except ClusterError as error:
            await self._refuse(frame.id, error)
        except Exception as error:  # a bug in the service: it must not reach other calls
            log.error("handler crashed", error=error, request=type(frame.request).__name__, peer=self._peer)
            await self._refuse(frame.id, ClusterError(f"internal error in {type(frame.request).__name__}"))

    async def _call(self, frame: Call) -> None:
        context = CallContext(frame.trace, frame.step, self._peer, frame.timeout_s, self._names)
        scope = asyncio.timeout(frame.timeout_s)
        try:
            async with scope:
                reply = await self._service.call(frame.request, context)
        except TimeoutError:
            if not scope.expired():
                raise
            raise TimedOut(f"{type(frame.request).__name__} took over {frame.timeout_s:g} s") from None
        await self._writable()
        self._pipe.send(Reply(frame.id, reply))

    async def _refuse(self, call_id: int, error: ClusterError) -> None:
        with suppress(PeerLost):
            await self._writable()
            self._fail(call_id, error)

    async def _stream(self, frame: Open) -> None:
        context = CallContext(frame.trace, frame.step, self._peer, names=self._names)
        async with aclosing(self._service.stream(frame.request, context)) as replies:
            sent = 0
            async for reply in replies:
                await self._writable()
                self._pipe.send(Item(frame.id, reply))
                sent += 1
                if sent % _BURST_ITEMS == 0:
                    await asyncio.sleep(0)  # a handler that never waits must not starve the others
        self._pipe.send(End(frame.id))

    def _fail(self, call_id: int, error: ClusterError) -> None:
        message = str(error)[:_MESSAGE_CHARS_MAX].encode(errors="replace").decode()
        self._pipe.send(Fail(call_id, error.code, message))

    def _on_done(self, call_id: int, task: asyncio.Task[None]) -> None:
        self._running -= 1
        self._wanted.pop(call_id, None)
        self._streams.pop(call_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("handler could not be answered", error=error, peer=self._peer)
        if self.closed and self._running == 0:
            self._finish()

    def _prove_life(self) -> None:
        self._alive = None
        if self._streams:
            self._pipe.send(Alive(tuple(self._streams)))
            self._alive = self._loop.call_later(self._limits.alive_s, self._prove_life)

    def _on_greeted(self) -> None:
        self._hello_timer.cancel()

    def _on_no_hello(self) -> None:
        self._end(PeerLost(f"no greeting within {self._limits.hello_s:g} s"))

    def _on_end(self, error: ClusterError) -> None:
        self._hello_timer.cancel()
        if self._alive is not None:
            self._alive.cancel()
        wanted, self._wanted = self._wanted, {}
        self._streams.clear()
        for task in wanted.values():
            task.cancel()
        if self._running == 0:
            self._finish()

    def _finish(self) -> None:
        try:
            if self._greeted:
                self._service.disconnected(self._peer)
        except Exception as error:  # a bug in the service: the server lives on
            log.error("disconnected() crashed", error=error, peer=self._peer)
        self._finished.set()
        self._on_gone(self)


async def close_all(sessions: Sequence[ServerSession]) -> None:
    """Close sessions at once; wait for their handlers to end, for a bounded time."""
    if sessions:
        _, late = await asyncio.wait([asyncio.ensure_future(s.close()) for s in sessions], timeout=_HANDLERS_END_S)
        for task in late:
            task.cancel()
            log.error("handlers did not end when the server closed")
