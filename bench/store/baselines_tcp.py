"""What moving bytes over TCP costs without a store: one blocking socket pair, large buffers, nothing else."""

import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Literal

from tracehaul.rpc.tcp import split_address
from tracehaul.runtime import clock
from tracehaul.transfer.memory import allocate

Way = Literal["get", "put"]
_ORDER = struct.Struct("<3sIII")
"""Way, batch, bytes of a batch, bytes of a block."""
_ACK = b"!"


class RawClient:
    """The side that asks: gets into, and puts from, ``memory``."""

    def __init__(self, address: str, memory: memoryview) -> None:
        self._socket = socket.create_connection(split_address(address))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._memory = memory

    def move(self, way: Way, batch: int, batch_bytes: int, size: int) -> tuple[float, float]:
        """Move one batch block by block; when it began and ended."""
        start_s = clock.perf_s()
        self._socket.sendall(_ORDER.pack(way.encode(), batch, batch_bytes, size))
        if way == "get":
            _receive(self._socket, self._memory, batch, batch_bytes, size)
        else:
            _send(self._socket, self._memory, batch, batch_bytes, size)
            assert self._socket.recv(1) == _ACK
        return start_s, clock.perf_s()


def serve_raw(host: str, nbytes: int, say: Callable[[Any], None]) -> None:
    """Serve connections, each in a thread; ``say`` is told the address."""
    memory = allocate(nbytes, "raw").buffer
    with socket.create_server((host, 0)) as server:
        say(f"{host}:{server.getsockname()[1]}")
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_serve, args=(connection, memory), daemon=True).start()


def _serve(connection: socket.socket, memory: memoryview) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        while order := connection.recv(_ORDER.size, socket.MSG_WAITALL):
            way, batch, batch_bytes, size = _ORDER.unpack(order)
            if way == b"get":
                _send(connection, memory, batch, batch_bytes, size)
            else:
                _receive(connection, memory, batch, batch_bytes, size)
                connection.sendall(_ACK)


def _send(connection: socket.socket, memory: memoryview, batch: int, batch_bytes: int, size: int) -> None:
    for at in range(batch * batch_bytes, (batch + 1) * batch_bytes, size):
        connection.sendall(memory[at : at + size])


def _receive(connection: socket.socket, memory: memoryview, batch: int, batch_bytes: int, size: int) -> None:
    for at in range(batch * batch_bytes, (batch + 1) * batch_bytes, size):
        room = memory[at : at + size]
        while room:
            received = connection.recv_into(room)
            assert received, "the other side is gone"
            room = room[received:]
