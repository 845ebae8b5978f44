"""The client's end of a connection: numbers calls, matches replies, buffers streams."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from tracehaul.rpc.base import NO_CONTEXT, CallContext
from tracehaul.rpc.frames import TIMEOUT_S_MAX, Alive, Call, Cancel, End, Fail, Frame, Item, Open, Reply
from tracehaul.rpc.session import Limits, Pipe, Session, lost_error
from tracehaul.runtime.clock import now_s
from tracehaul.wire import messages
from tracehaul.wire.errors import (
    ClusterError,
    Overloaded,
    ProtocolError,
    TimedOut,
    error_from_code,
)

_LAG_S = 0.5
"""A timer this late means that our own loop stood still: the peer's frames may wait in the socket unread."""


class ClientSession(Session):
    """Implements :class:`tracehaul.rpc.base.Connection`."""

    def __init__(self, pipe: Pipe, limits: Limits) -> None:
        super().__init__(pipe, limits)
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._last_id = 0
        self._calls: dict[int, asyncio.Future[messages.Reply | ClusterError]] = {}
        self._streams: dict[int, _Inbox] = {}

    async def greeted(self) -> None:
        """Wait for the server's greeting; the caller sets the deadline.

        Raises:
            ProtocolError: it speaks something else.
            PeerLost: it closed the connection.
        """
        if not self.closed:
            await self._ready
        if self._ended is not None:
            raise self._ended

    async def call(
        self, request: messages.Request, *, timeout_s: float, context: CallContext = NO_CONTEXT
    ) -> messages.Reply:
        if timeout_s <= 0:
            raise TimedOut(f"no time left for {_name(request)}")
        timeout_s = min(timeout_s, TIMEOUT_S_MAX)
        deadline_s = now_s() + timeout_s
        future: asyncio.Future[messages.Reply | ClusterError] = self._loop.create_future()
        call_id = None
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._writable()
                left_s = min(max(deadline_s - now_s(), 1e-6), TIMEOUT_S_MAX)
                call_id = self._send_call(request, left_s, context)
                self._calls[call_id] = future
                outcome = await future
        except TimeoutError:
            raise TimedOut(f"no reply to {_name(request)} within {timeout_s:g} s") from None
        finally:
            if call_id is not None and self._calls.pop(call_id, None) is not None:
                self._pipe.send(Cancel(call_id))
        if isinstance(outcome, ClusterError):
            raise outcome
        return outcome

    def _send_call(self, request: messages.Request, timeout_s: float, context: CallContext) -> int:
        call_id = self._last_id + 1
        self._pipe.send(Call(call_id, request, timeout_s, context.trace, context.step))
        self._last_id = call_id  # only now: an oversize request was not sent
        return call_id

    async def stream(
        self, request: messages.Request, *, idle_timeout_s: float, context: CallContext = NO_CONTEXT
    ) -> AsyncGenerator[messages.Reply, None]:
        stream_id = None
        try:
            try:
                async with asyncio.timeout(idle_timeout_s):
                    await self._writable()
            except TimeoutError:
                raise TimedOut(f"{_name(request)} could not be sent for {idle_timeout_s:g} s") from None
            stream_id = self._last_id + 1
            self._pipe.send(Open(stream_id, request, context.trace, context.step))
            self._last_id = stream_id
            inbox = self._streams[stream_id] = _Inbox(_name(request))
            while True:
                while inbox.items:
                    yield inbox.items.popleft()
                if inbox.error is not None:
                    raise inbox.error
                if inbox.complete:
                    return
                await inbox.wait(idle_timeout_s)
        finally:
            if stream_id is not None and self._streams.pop(stream_id, None) is not None:
                self._pipe.send(Cancel(stream_id))

    def _handle(self, frame: Frame) -> None:
        match frame:
            case Reply(id=call_id, reply=reply):
                self._settle(call_id, reply)
            case Item(id=stream_id, reply=reply):
                self._item(stream_id, reply)
            case End(id=stream_id):
                inbox = self._streams.pop(stream_id, None)
                if inbox is not None:
                    inbox.finish(None)
            case Fail(id=call_id, code=code, message=message):
                error = error_from_code(code, message)
                inbox = self._streams.pop(call_id, None)
                if inbox is not None:
                    inbox.finish(error)
                else:
                    self._settle(call_id, error)
            case Alive(ids=ids):
                for stream_id in ids:
                    inbox = self._streams.get(stream_id)
                    if inbox is not None:
                        inbox.heard_s = now_s()
            case _:
                raise ProtocolError(f"a server never sends {type(frame).__name__}")

    def _settle(self, call_id: int, outcome: messages.Reply | ClusterError) -> None:
        future = self._calls.pop(call_id, None)  # None: we gave up on it, and the reply crossed our Cancel
        if future is not None and not future.done():
            future.set_result(outcome)  # errors too: an exception that nobody awaits any more would be logged

    def _item(self, stream_id: int, reply: messages.Reply) -> None:
        inbox = self._streams.get(stream_id)
        if inbox is None:
            return
        if len(inbox.items) < self._limits.stream_items_max:
            inbox.put(reply)
            return
        del self._streams[stream_id]
        self._pipe.send(Cancel(stream_id))
        inbox.finish(Overloaded(f"{inbox.name}: {len(inbox.items)} replies wait for their consumer"))

    def _on_greeted(self) -> None:
        self._wake_ready()

    def _on_end(self, error: ClusterError) -> None:
        self._wake_ready()
        calls, self._calls = self._calls, {}
        streams, self._streams = self._streams, {}
        for future in calls.values():
            if not future.done():
                future.set_result(lost_error(error))
        for inbox in streams.values():
            inbox.finish(lost_error(error))

    def _wake_ready(self) -> None:
        if not self._ready.done():
            self._ready.set_result(None)


class _Inbox:
    """What a stream received and its consumer has not taken."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.items: deque[messages.Reply] = deque()
        self.complete = False
        self.error: ClusterError | None = None
        self.heard_s = now_s()
        """When the server last proved that the stream's handler lives."""
        self._arrival: asyncio.Event | None = None

    def put(self, reply: messages.Reply) -> None:
        """The next reply."""
        self.items.append(reply)
        self.heard_s = now_s()
        self._wake()

    def finish(self, error: ClusterError | None) -> None:
        """Nothing follows; raised as ``error`` after the items, if there is one."""
        self.complete = True
        self.error = error
        self._wake()

    async def wait(self, idle_timeout_s: float) -> None:
        """Wait for an item or the end.

        Raises:
            TimedOut: no sign of life for ``idle_timeout_s``.
        """
        self._arrival = asyncio.Event()
        try:
            while not self.items and not self.complete:
                deadline_s = self.heard_s + idle_timeout_s
                try:
                    async with asyncio.timeout_at(deadline_s):
                        await self._arrival.wait()
                except TimeoutError:
                    if now_s() > deadline_s + _LAG_S:
                        self.heard_s = now_s()
                    elif now_s() >= self.heard_s + idle_timeout_s:
                        raise TimedOut(f"{self.name}: peer silent for {idle_timeout_s:g} s") from None
        finally:
            self._arrival = None

    def _wake(self) -> None:
        if self._arrival is not None:
            self._arrival.set()


def _name(request: messages.Request) -> str:
    return type(request).__name__
