"""Sockets moved by a few threads: each waits for the next socket that can go on, and moves it for a turn.

One wait serves all threads, and a socket is handed to one thread at a time, so nothing is lost on a peer that stops:
its socket waits, the threads go on with others. Idle costs nothing.
"""

import contextlib
import os
import select
import threading
from concurrent.futures import Future, InvalidStateError
from typing import Protocol

READABLE = select.EPOLLIN | select.EPOLLRDHUP
WRITABLE = select.EPOLLOUT
_ONCE = select.EPOLLONESHOT


class Socket(Protocol):
    """Of a socket, or what is over one, as much as is needed here."""

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class Line(Protocol):
    """One socket and what is going on on it."""

    @property
    def socket(self) -> Socket:
        """Non-blocking."""
        ...

    def advance(self) -> bool:
        """Go on as far as the socket lets it, for a turn; then arm the line again, as the last thing done.

        On a thread of the pump. True if the line has ended: its socket is then closed.
        """
        ...


class Pump:
    """Threads over one epoll."""

    def __init__(self, name: str, threads: int) -> None:
        self._epoll = select.epoll()
        self._lines: dict[int, Line] = {}
        self.ended: Future[None] = Future()
        """Done when a thread has ended; with what ended it, if that was a fault of ours."""
        self._closing = os.eventfd(0, os.EFD_NONBLOCK)
        self._epoll.register(self._closing, select.EPOLLIN)
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, line: Line, events: int) -> None:
        """Take a line in."""
        fd = line.socket.fileno()
        self._lines[fd] = line
        self._epoll.register(fd, events | _ONCE)

    def arm(self, line: Line, events: int) -> None:
        """Advance a line, once, when ``events`` come. Replaces what it waited for."""
        self._epoll.modify(line.socket.fileno(), events | _ONCE)

    def close(self) -> None:
        """End the threads and close every socket."""
        os.eventfd_write(self._closing, 1)
        for thread in self._threads:
            thread.join()
        for line in list(self._lines.values()):
            line.socket.close()
        self._lines.clear()
        self._epoll.close()
        os.close(self._closing)

    def _work(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        with contextlib.suppress(InvalidStateError):  # another thread was first
            if error is None:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(error)

    def _serve(self) -> None:
        while True:
            fd, _ = self._epoll.poll(maxevents=1)[0]
            if fd == self._closing:
                return
            line = self._lines[fd]
            if line.advance():
                del self._lines[fd]
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)
                line.socket.close()
