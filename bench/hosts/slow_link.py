"""A program: a link that takes its time, between a host's and a new port of the hosts' bridge.

Kernels without netem hold no packet back, so this copies frames both ways and sends each once it is due. Frames keep
their order. Its arguments: the host's link, the name of the port to make, its bridge, seconds each way, the most that
chance adds to them or takes, and the share of frames that are lost. It says a line once frames go through it.
"""

import fcntl
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time  # noqa: TID251 - of no node
from collections import deque
from collections.abc import Callable

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
SOL_PACKET, PACKET_IGNORE_OUTGOING, ETH_P_ALL = 263, 23, 3
FRAME_BYTES_MAX = 1 << 16
FRAMES_MAX = 20_000
"""On their way; more are dropped, as any queue does."""
BURST = 64


class Way:
    """One direction."""

    def __init__(self, send: Callable[[bytes], object], delay_s: float, jitter_s: float, loss: float) -> None:
        self._send = send
        self._delay_s, self._jitter_s, self._loss = delay_s, jitter_s, loss
        self._frames: deque[tuple[float, bytes]] = deque()
        self._last_s = 0.0
        self._random = random.Random(0)

    def take(self, frame: bytes, now_s: float) -> None:
        """A frame that has come in."""
        if self._random.random() < self._loss or len(self._frames) >= FRAMES_MAX:
            return
        due_s = now_s + self._delay_s + self._random.uniform(-self._jitter_s, self._jitter_s)
        self._last_s = max(self._last_s, due_s)
        self._frames.append((self._last_s, frame))

    def give(self, now_s: float) -> float | None:
        """Send what is due; when the next is. None: there is none."""
        while self._frames and self._frames[0][0] <= now_s:
            _, frame = self._frames.popleft()
            try:
                self._send(frame)
            except OSError:  # the link is down, or its queue is full
                continue
        return self._frames[0][0] if self._frames else None


def main(link: str, port: str, bridge: str, delay_s: str, jitter_s: str, loss: str) -> None:
    """Until it is killed."""
    # Without an offer to take them whole, the kernel cuts and sums what goes to a tap; the host's side was told to.
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", port.encode(), IFF_TAP | IFF_NO_PI))
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    wire.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    wire.bind((link, 0))
    wire.setblocking(False)
    subprocess.run(["ip", "link", "set", link, "nomaster"], check=True)
    subprocess.run(["ip", "link", "set", port, "master", bridge, "up"], check=True)
    numbers = float(delay_s), float(jitter_s), float(loss)
    ways = Way(lambda frame: os.write(tap, frame), *numbers), Way(wire.send, *numbers)
    poll = select.epoll()
    poll.register(wire, select.EPOLLIN)
    poll.register(tap, select.EPOLLIN)
    print("ready", flush=True)
    while True:
        dues = [due_s for way in ways if (due_s := way.give(time.monotonic())) is not None]
        wait_s = max(0.0, min(dues) - time.monotonic()) if dues else -1
        for ready, _ in poll.poll(wait_s):
            way = ways[0] if ready == wire.fileno() else ways[1]
            for _ in range(BURST):
                try:
                    frame = os.read(ready, FRAME_BYTES_MAX)
                except BlockingIOError:
                    break
                except OSError:  # the link is down
                    break
                way.take(frame, time.monotonic())


if __name__ == "__main__":
    main(*sys.argv[1:])
