"""Starts and stops the processes of the store's bench, on this host or in two network namespaces."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

MODULE = "bench.store.process"
END_S = 3.0
SUBNET = "10.213.77"


class Place(NamedTuple):
    """Where a process runs: its address, how to start it there, what UCX must be told."""

    host: str
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}


class Process:
    """The parent's handle on one process: JSON lines both ways."""

    def __init__(self, place: Place, *words: str, module: str = MODULE, python: str = sys.executable) -> None:
        self._process = subprocess.Popen(
            [*place.command, python, "-m", module, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **place.environment},
        )

    def hear(self) -> Any:
        """The next line it says.

        Raises:
            RuntimeError: it has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the bench ended with {self._process.wait()}")
        return json.loads(line)

    def tell(self, **command: Any) -> None:
        """Send a command; :meth:`hear` gives its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")

    def ask(self, **command: Any) -> Any:
        """Send a command and wait for its answer."""
        self.tell(**command)
        return self.hear()

    def send(self, number: int) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def end(self) -> None:
        """End its input, which ends it; kill it if it does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def running(*processes: Process) -> Generator[None, None, None]:
    """End processes, whatever happens."""
    try:
        yield
    finally:
        for process in processes:
            process.end()


@contextlib.contextmanager
def two_places() -> Generator[tuple[Place, Place, str], None, None]:
    """Where to run a node and its clients so that only TCP connects them, and what that is in words."""
    quiet = {"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "fatal", "UCX_TLS": "tcp"}
    if os.geteuid() != 0 or shutil.which("ip") is None:
        here = Place("127.0.0.1", (), {**quiet, "UCX_NET_DEVICES": "lo"})
        yield here, here, "loopback (no ip command, or not root)"
        return
    names = [f"store-bench-{os.getpid()}-{end}" for end in "ab"]
    devices = [f"sb{os.getpid() % 10**6}{end}" for end in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        for number, (name, device) in enumerate(zip(names, devices, strict=True), start=1):
            _ip("link", "set", device, "netns", name)
            _ip("-n", name, "addr", "add", f"{SUBNET}.{number}/24", "dev", device)
            _ip("-n", name, "link", "set", device, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        first, second = (
            Place(
                f"{SUBNET}.{number}", ("ip", "netns", "exec", name), {**quiet, "UCX_NET_DEVICES": devices[number - 1]}
            )
            for number, name in enumerate(names, start=1)
        )
        yield first, second, "two network namespaces joined by veth"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def together(clients: Sequence[Process], **command: Any) -> float:
    """Seconds from the first client's start to the last one's end of the same command."""
    for client in clients:
        client.tell(**command)
    spans = [client.hear() for client in clients]
    return max(end_s for _, end_s in spans) - min(start_s for start_s, _ in spans)
