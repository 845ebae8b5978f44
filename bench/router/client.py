"""The client of the router's bench: HTTP over plain sockets and one epoll, so that the client costs little.

It sends requests that were made before, counts a word in what comes back, and knows when an answer has ended.
"""

import select
import socket
from array import array
from collections.abc import Callable
from contextlib import suppress

from tracehaul.runtime import clock

READ_BYTES = 1 << 18
CHUNKS_END = b"\r\n0\r\n\r\n"
SILENCE_S = 120.0
"""Without anything from the server for so long, the bench fails."""


class Answer:
    """What came of one request, as it grows."""

    def __init__(self) -> None:
        self.sent_s = clock.perf_s()
        """When its first byte was given to the socket."""
        self.ended_s = 0.0
        """0 while it grows."""
        self.status = 0
        self.told_s = array("d")
        """When each word of it was read."""
        self.body = b""
        """Of an answer that is no stream."""


class Connection:
    """One kept open, with at most one request under way."""

    def __init__(self, port: int, word: bytes, epoll: select.epoll) -> None:
        assert len(word) >= len(CHUNKS_END)  # what is kept of a read is enough to see either across two
        self._port = port
        self._word = word
        self._epoll = epoll
        self.answer = Answer()
        self.busy = False
        self._socket: socket.socket | None = None
        self._rest = memoryview(b"")
        """Of the request, what is still to be sent."""
        self._tail = b""
        """The end of what was read, in which a word may have begun; all of it before the head's end."""
        self._body_left = -1
        """Bytes that follow; -1: chunks do."""

    def fileno(self) -> int:
        """Of the open socket."""
        assert self._socket is not None
        return self._socket.fileno()

    def open(self) -> None:
        """Connect if it is not."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setblocking(False)
            self._epoll.register(self._socket, select.EPOLLIN)

    def close(self) -> None:
        """Disconnect."""
        if self._socket is not None:
            self._epoll.unregister(self._socket)
            self._socket.close()
            self._socket = None

    def send(self, request: bytes) -> None:
        """Send a request; the last one's answer has ended."""
        assert not self.busy
        self.busy = True
        self._rest, self._tail, self._body_left = memoryview(request), b"", -1
        self.answer = Answer()
        self.write()

    def write(self) -> None:
        """Give the socket what it takes now; of much a part, in turn with the other connections."""
        assert self._socket is not None
        with suppress(BlockingIOError, ConnectionError):  # a refused body is not read to its end
            self._rest = self._rest[self._socket.send(self._rest[:READ_BYTES]) :]
        self._epoll.modify(self._socket, select.EPOLLIN | (select.EPOLLOUT if self._rest else 0))

    def read(self) -> None:
        """Take what has come."""
        assert self._socket is not None
        data = self._socket.recv(READ_BYTES)
        if not data:
            if self.busy:
                raise RuntimeError(f"the router closed a connection in mid-answer: {bytes(self._tail[-300:])!r}")
            self.close()
            return
        now_s = clock.perf_s()
        answer = self.answer
        data = self._tail + data
        if answer.status == 0:
            head, found, data = data.partition(b"\r\n\r\n")
            if not found:
                self._tail = head
                return
            answer.status = int(head[9:12])
            length = head.lower().partition(b"\r\ncontent-length: ")[2]
            if length:
                self._body_left = int(length.partition(b"\r\n")[0])
            data = b"\r\n" + data if self._body_left < 0 else data
        if self._body_left >= 0:
            answer.body += data
            self._tail = b""
            self._body_left -= len(data)
            self._end(now_s, ended=self._body_left <= 0)
            return
        if told := data.count(self._word):
            answer.told_s.extend([now_s] * told)
        self._tail = data[1 - len(self._word) :]
        self._end(now_s, ended=data.endswith(CHUNKS_END))

    def _end(self, now_s: float, *, ended: bool) -> None:
        if ended:
            self.answer.ended_s = now_s
            self.busy = False


class Client:
    """Connections to one port."""

    def __init__(self, port: int, word: bytes, connections: int = 1) -> None:
        self._epoll = select.epoll()
        self.connections = [Connection(port, word, self._epoll) for _ in range(connections)]
        self._by_fileno: dict[int, Connection] = {}

    def send(self, connection: Connection, request: bytes) -> None:
        """Send a request on an idle connection."""
        connection.open()
        self._by_fileno[connection.fileno()] = connection
        connection.send(request)

    def poll(self, ended: Callable[[Connection], None] = lambda connection: None, timeout_s: float = SILENCE_S) -> int:
        """Wait, and take what has come; ``ended`` is told of each answer's end. Returns on how many connections
        anything came."""
        found = self._epoll.poll(timeout_s, len(self.connections))
        for fileno, events in found:
            connection = self._by_fileno[fileno]
            if events & select.EPOLLOUT:
                connection.write()
            if events & ~select.EPOLLOUT:
                was_busy = connection.busy
                connection.read()
                if was_busy and not connection.busy:
                    ended(connection)
        return len(found)

    def ask(self, request: bytes) -> Answer:
        """One request on the first connection; returns when it was answered."""
        connection = self.connections[0]
        self.send(connection, request)
        self.wait()
        return connection.answer

    def wait(self) -> None:
        """Until every answer has ended."""
        while any(connection.busy for connection in self.connections):
            if not self.poll():
                raise RuntimeError(f"nothing came from the router for {SILENCE_S:.0f} s")

    def each(self, following: Callable[[int, Answer | None], bytes | None]) -> None:
        """Every connection sends one request after the other, until there are no more.

        ``following`` gives the next request of connection ``i`` after the answer to its last one (None: the first).
        """
        numbers = {id(connection): number for number, connection in enumerate(self.connections)}

        def go_on(connection: Connection) -> None:
            request = following(numbers[id(connection)], connection.answer)
            if request is not None:
                self.send(connection, request)

        for number, connection in enumerate(self.connections):
            if (request := following(number, None)) is not None:
                self.send(connection, request)
        while any(connection.busy for connection in self.connections):
            if not self.poll(go_on):
                raise RuntimeError(f"nothing came from the router for {SILENCE_S:.0f} s")

    def close(self) -> None:
        """Disconnect all."""
        for connection in self.connections:
            connection.close()
        self._epoll.close()


def must(answer: Answer, status: int = 200) -> Answer:
    """That answer, if it is as expected."""
    if answer.status != status or (status == 200 and not answer.told_s):
        raise RuntimeError(f"the router answered {answer.status}, not {status}: {answer.body[:300]!r}")
    return answer
