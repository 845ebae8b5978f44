"""What a pull between hosts reaches of the wire between them: namespaces on links of known speed. Needs root."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator
from statistics import median
from typing import Any

from bench.common.report import Result
from bench.store.process import BATCH_BYTES, BATCHES

LINKS_GBIT = (1, 2)
ROUNDS = 3
FIRSTS = 5
"""Clients that pull for the first time in their lives."""
BLOCK_BYTES = 1 << 20
WARM_PULLS = 5
ARENA_BYTES = 2 * BATCHES * BATCH_BYTES
SETTLE_S = 1.0
"""Between joining and the first pull, at least: a worker's first step comes later."""


class Process:
    """One process of the store's bench, in a namespace; see :mod:`bench.store.process`."""

    def __init__(self, space: str, *arguments: object) -> None:
        command = ["ip", "netns", "exec", space, sys.executable, "-m", "bench.store.process", *map(str, arguments)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=dict(os.environ))
        self.said = self._heard()

    def ask(self, **command: object) -> Any:
        """Its answer to one command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._heard()

    def seconds(self, **command: object) -> float:
        """How long it took to carry out one command."""
        start_s, end_s = self.ask(**command)
        return end_s - start_s

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _heard(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the bench ended")
        return json.loads(line)


def measure() -> list[Result]:
    """On each link, over our own TCP: pulls as a share of raw TCP, and a first pull over a warm one."""
    results: list[Result] = []
    for gbit in LINKS_GBIT:
        with _link(gbit) as (here, there):
            results += _on_link(gbit, here, there)
    return results


def _on_link(gbit: int, here: str, there: str) -> list[Result]:
    with contextlib.ExitStack() as stack:

        def start(space: str, *arguments: object) -> Process:
            process = Process(space, *arguments)
            stack.callback(process.close)
            return process

        node = start(there, "node", "tcp", "10.90.0.2", ARENA_BYTES, BLOCK_BYTES)
        raw = start(there, "raw", "10.90.0.2")
        client = start(here, "client", "tcp", "10.90.0.1", "bench")
        client.ask(do="attach", info=node.said, size=BLOCK_BYTES)
        client.seconds(do="put", batch=0)
        pulls: list[float] = []
        baseline: list[float] = []
        for _ in range(ROUNDS):  # by turns: what else the machine does meets both
            pulls.append(client.seconds(do="get", batch=0))
            baseline.append(client.seconds(do="raw", way="get", batch=0, address=raw.said))
        ratio = median(baseline) / median(pulls)
        rate = BATCH_BYTES / median(pulls) / 1e9
        firsts: list[float] = []
        warms: list[float] = []
        for _ in range(FIRSTS):
            # Of one name: it asks for the blocks that the client has put.
            fresh = start(here, "client", "tcp", "10.90.0.1", "bench")
            fresh.ask(do="attach", info=node.said, size=BLOCK_BYTES)
            threading.Event().wait(SETTLE_S)
            firsts.append(fresh.seconds(do="get", batch=0, blocks=1))
            warms += [fresh.seconds(do="get", batch=0, blocks=1) for _ in range(WARM_PULLS)]
            fresh.close()
    first, warm = median(firsts), median(warms)
    return [
        Result(f"hosts.pull.{gbit}gbit", rate, "GB/s", "raw TCP", ratio),
        Result(f"hosts.first_pull.{gbit}gbit", first * 1e3, "ms", "a warm pull", first / warm),
    ]


@contextlib.contextmanager
def _link(gbit: int) -> Generator[tuple[str, str]]:
    """Two network namespaces on a link of that speed in both directions."""
    here, there = f"thb{os.getpid()}a", f"thb{os.getpid()}b"
    with contextlib.ExitStack() as stack:
        for space in (here, there):
            _run("ip", "netns", "add", space)
            stack.callback(_run, "ip", "netns", "delete", space)
        _run("ip", "link", "add", "eth0", "netns", here, "type", "veth", "peer", "name", "eth0", "netns", there)
        for space, address in ((here, "10.90.0.1/24"), (there, "10.90.0.2/24")):
            inside = ("ip", "netns", "exec", space)
            _run(*inside, "ip", "address", "add", address, "dev", "eth0")
            _run(*inside, "ip", "link", "set", "eth0", "up")
            _run(*inside, "ip", "link", "set", "lo", "up")
            shape = ("rate", f"{gbit}gbit", "burst", "256k", "latency", "50ms")
            _run(*inside, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *shape)
        yield here, there


def _run(*words: str) -> None:
    subprocess.run(words, check=True)
