"""The client's end of a connection: numbers calls, matches replies, buffers streams."""

import asyncio
from collections import deque
from collections.abc import Callable

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
        self._streams: dict[int, ReplyStream] = {}

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

    def stream(
        self, request: messages.Request, *, idle_timeout_s: float, context: CallContext = NO_CONTEXT
    ) -> "ReplyStream":
        return ReplyStream(self, request, idle_timeout_s, context)

    async def open(self, stream: "ReplyStream", request: messages.Request, context: CallContext) -> int:
        """Send a stream's request; returns its number. What comes is put into ``stream`` until it is closed.

        Raises:
            PeerLost: the connection broke.
        """
        await self._writable()
        stream_id = self._last_id + 1
        self._pipe.send(Open(stream_id, request, context.trace, context.step))
        self._last_id = stream_id
        self._streams[stream_id] = stream
        return stream_id

    def drop(self, stream_id: int) -> None:
        """A stream is not wanted any more."""
        if self._streams.pop(stream_id, None) is not None:
            self._pipe.send(Cancel(stream_id))

    def _handle(self, frame: Frame) -> None:
        if isinstance(frame, Item):  # nearly all are
            stream = self._streams.get(frame.id)
            if stream is not None and not stream.put(frame.reply, self._limits.stream_items_max):
                self._overload(frame.id, stream)
            return
        match frame:
            case Reply(id=call_id, reply=reply):
                self._settle(call_id, reply)
            case End(id=stream_id):
                stream = self._streams.pop(stream_id, None)
                if stream is not None:
                    stream.finish(None)
            case Fail(id=call_id, code=code, message=message):
                error = error_from_code(code, message)
                stream = self._streams.pop(call_id, None)
                if stream is not None:
                    stream.finish(error)
                else:
                    self._settle(call_id, error)
            case Alive(ids=ids):
                for stream_id in ids:
                    stream = self._streams.get(stream_id)
                    if stream is not None:
                        stream.hear()
            case _:
                raise ProtocolError(f"a server never sends {type(frame).__name__}")

    def _settle(self, call_id: int, outcome: messages.Reply | ClusterError) -> None:
        future = self._calls.pop(call_id, None)  # None: we gave up on it, and the reply crossed our Cancel
        if future is not None and not future.done():
            future.set_result(outcome)  # errors too: an exception that nobody awaits any more would be logged

    def _overload(self, stream_id: int, stream: "ReplyStream") -> None:
        self.drop(stream_id)
        stream.finish(Overloaded(f"{stream.name}: {self._limits.stream_items_max} replies wait for their consumer"))

    def _on_greeted(self) -> None:
        self._wake_ready()

    def _on_end(self, error: ClusterError) -> None:
        self._wake_ready()
        calls, self._calls = self._calls, {}
        streams, self._streams = self._streams, {}
        for future in calls.values():
            if not future.done():
                future.set_result(lost_error(error))
        for stream in streams.values():
            stream.finish(lost_error(error))

    def _wake_ready(self) -> None:
        if not self._ready.done():
            self._ready.set_result(None)


class ReplyStream:
    """Implements :class:`tracehaul.rpc.base.Replies`: what a stream received and its consumer has not taken.

    One timer, moved when it fires and not with each reply, watches over the server's silence.
    """

    def __init__(
        self, session: ClientSession, request: messages.Request, idle_timeout_s: float, context: CallContext
    ) -> None:
        self.name = _name(request)
        self._session = session
        self._request: messages.Request | None = request
        """Until it is sent."""
        self._context = context
        self._idle_timeout_s = idle_timeout_s
        self._id = 0
        self._items: deque[messages.Reply] = deque()
        self._complete = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        """Of the consumer, where nothing has come."""
        self._diverted: Callable[[messages.Reply], bool] | None = None
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._heard_s = 0.0
        """When the server last proved that the stream's handler lives."""
        self._due_s = 0.0
        """When the timer fires."""
        self._timer: asyncio.TimerHandle | None = None

    # --- of the consumer ---------------------------------------------------------------------------------------

    def __aiter__(self) -> "ReplyStream":
        return self

    async def __anext__(self) -> messages.Reply:
        if self._items:
            return self._items.popleft()
        items = await self.take()
        if not items:
            raise StopAsyncIteration
        self._items.extend(items[1:])
        return items[0]

    async def take(self) -> list[messages.Reply]:
        try:
            if self._request is not None:
                await self._open(self._request)
            while not self._items:
                if self._complete:
                    if self._error is not None:
                        raise self._error
                    return []
                self._waiter = self._loop.create_future()
                await self._waiter
        except BaseException:
            self._close()
            raise
        items = list(self._items)
        self._items.clear()
        return items

    def divert(self, take: Callable[[messages.Reply], bool]) -> None:
        self._diverted = take

    async def aclose(self) -> None:
        self._close()

    async def _open(self, request: messages.Request) -> None:
        self._request = None
        try:
            async with asyncio.timeout(self._idle_timeout_s):
                self._id = await self._session.open(self, request, self._context)
        except TimeoutError:
            raise TimedOut(f"{self.name} could not be sent for {self._idle_timeout_s:g} s") from None
        self.hear()
        self._watch(self._heard_s + self._idle_timeout_s)

    def _close(self) -> None:
        self._request = self._diverted = None
        self._end(None)
        self._items.clear()
        if self._id:
            self._session.drop(self._id)

    # --- of the session ----------------------------------------------------------------------------------------

    def put(self, reply: messages.Reply, items_max: int) -> bool:
        """The next reply; False: too many wait already."""
        self._heard_s = self._clock()
        waiter = self._waiter
        if waiter is not None and not waiter.done() and self._diverted is not None:
            try:
                if self._diverted(reply):
                    return True
            except Exception as error:
                self._session.drop(self._id)
                self.finish(error)
                return True
        if len(self._items) >= items_max:
            return False
        self._items.append(reply)
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)
        return True

    def hear(self) -> None:
        """A sign of life."""
        self._heard_s = self._clock()

    def finish(self, error: Exception | None) -> None:
        """Nothing follows; raised as ``error`` after what has come, if there is one."""
        if not self._complete:
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        self._complete, self._error = True, error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _watch(self, due_s: float) -> None:
        self._due_s = due_s
        self._timer = self._loop.call_at(due_s, self._look)

    def _look(self) -> None:
        now = self._clock()
        if now > self._due_s + _LAG_S:
            self._heard_s = now
        if now < self._heard_s + self._idle_timeout_s:
            self._watch(self._heard_s + self._idle_timeout_s)
        else:
            self._session.drop(self._id)
            self.finish(TimedOut(f"{self.name}: peer silent for {self._idle_timeout_s:g} s"))


def _name(request: messages.Request) -> str:
    return type(request).__name__
