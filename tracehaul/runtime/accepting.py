"""Taking connections: none is refused in silence, whatever the reason.

libuv answers a lack of descriptors by closing what waits, and tells nobody. So connections are accepted here, and
given to the event loop one by one.
"""

import asyncio
import errno
import os
import resource
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from tracehaul.runtime.log import Log, Seldom

seldom = Seldom(Log(__name__))

BURST = 64
"""Connections taken before others run."""
PAUSE_S = 0.05
"""Where nothing can be taken: others must end first."""
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
_NO_MEMORY = (errno.ENOBUFS, errno.ENOMEM)


class AcceptStats(msgspec.Struct):
    """Counts of one listener's life."""

    accepted: int = 0
    refused: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """By reason: ``descriptors``, as the process has no more; ``connections``, as there are as many as may be."""

    def refuse(self, what: str, reason: str, **fields: object) -> None:
        """Count one that was refused, and say so now and then."""
        self.refused[reason] = self.refused.get(reason, 0) + 1
        seldom.warning("a connection was refused", f"{what} {reason}", listener=what, reason=reason, **fields)


class NoDescriptors(OSError):
    """The system's limit of open files is too low for what the config promises."""


def raise_nofile(needs: Sequence[tuple[str, int]]) -> None:
    """Let this process open so many files: the soft limit is raised if it is lower than the sum of ``needs``.

    Raises:
        NoDescriptors: the hard limit is lower; says which needs there are, by their names.
    """
    needed = sum(count for _, count in needs)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in (resource.RLIM_INFINITY,) or soft >= needed:
        return
    if hard not in (resource.RLIM_INFINITY,) and hard < needed:
        listed = ", ".join(f"{count} for {what}" for what, count in needs)
        raise NoDescriptors(
            f"this process may open {hard} files and the config promises more: {needed} ({listed}); "
            "raise the hard limit (ulimit -Hn), or lower what is named"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Spare:
    """A descriptor that is given up to close a connection for which there is none, so that its client is told."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._take()

    def refuse_one(self, listener: socket.socket) -> bool:
        """Accept and close what waits first; whether that could be done.

        Raises:
            BlockingIOError: nothing waits.
        """
        self.close()
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            raise
        except OSError:
            return False
        finally:
            self._take()
        return True

    def close(self) -> None:
        """Give it back."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _take(self) -> None:
        with suppress(OSError):  # without it nothing is refused until there is one
            self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


class Acceptor:
    """Takes the connections of listening, non-blocking sockets, which it owns, within a running event loop."""

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        made: Callable[[], asyncio.Protocol],
        stats: AcceptStats,
        *,
        what: str,
        tls: ssl.SSLContext | None = None,
        full: Callable[[], bool] = lambda: False,
    ) -> None:
        """``made``: a protocol for a connection. ``what``: of the listeners, in logs. ``full``: no more may come."""
        self._loop = asyncio.get_running_loop()
        self._listeners = list(listeners)
        self._made = made
        self._stats = stats
        self._what = what
        self._tls = tls
        self._full = full
        self._spare = Spare()
        self._opening: set[asyncio.Task[None]] = set()
        self._paused: asyncio.TimerHandle | None = None
        self._watch()

    def close(self) -> None:
        """Take no more, and give up those whose TLS is not through."""
        if self._paused is not None:
            self._paused.cancel()
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()
        for task in self._opening:
            task.cancel()
        self._spare.close()

    def _watch(self) -> None:
        self._paused = None
        for listener in self._listeners:
            self._loop.add_reader(listener, self._take, listener)

    def _pause(self) -> None:
        for listener in self._listeners:
            self._loop.remove_reader(listener)
        if self._paused is None:
            self._paused = self._loop.call_later(PAUSE_S, self._watch)

    def _take(self, listener: socket.socket) -> None:
        for _ in range(BURST):
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if not self._failed(listener, error):
                    return
                continue
            if self._full():
                sock.close()
                self._stats.refuse(self._what, "connections")
                continue
            self._stats.accepted += 1
            task = self._loop.create_task(self._open(sock))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    def _failed(self, listener: socket.socket, error: OSError) -> bool:
        """Whether to go on."""
        if error.errno in _NO_MEMORY:
            seldom.warning("no connection can be taken now", self._what, listener=self._what, why=error)
            self._pause()
            return False
        if error.errno not in NO_DESCRIPTOR:
            return True  # the connection's own: it is gone already
        try:
            if self._spare.refuse_one(listener):
                self._stats.refuse(self._what, "descriptors", why=error)
                return True
        except BlockingIOError:
            return False
        self._pause()
        return False

    async def _open(self, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._made, sock, ssl=self._tls)
        except OSError:  # it left, or its TLS is wrong
            sock.close()
