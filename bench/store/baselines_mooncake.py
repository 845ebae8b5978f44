"""What Mooncake Store moves in the same place: batch puts and gets from and to a registered buffer, over TCP.

Run as a program by an interpreter that has Mooncake, which need not be ours: it imports nothing else but numpy. Told
and answering in JSON lines like the other processes of the bench.
"""

import json
import os
import subprocess
import sys
import time  # noqa: TID251 - a program of its own, which does not run this project
from collections import deque
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

BATCH_BYTES = 64 << 20
BATCHES = 4
SEGMENT_BYTES = 1 << 30
MASTER_PORT = 50913
LEASE_TTL_MS = 1000
"""What was read can be removed when its lease is over; a read that outlives it fails."""
HELD_MAX = 8
"""Batches in the segment at once."""
START_TIMEOUT_S = 20.0


def connect(host: str, master: str, segment_bytes: int) -> Any:
    """A Mooncake client; with a segment it serves memory, too."""
    store: Any = import_module("mooncake.store").MooncakeDistributedStore()
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while code := store.setup(host, "P2PHANDSHAKE", segment_bytes, 16 << 20, "tcp", "", master):
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"Mooncake cannot be set up: {code}")
        time.sleep(0.5)
    return store


def serve(host: str) -> None:
    """The master and one segment, until the input ends."""
    program = Path(import_module("mooncake.store").__file__ or "").with_name("mooncake_master")
    words = [str(program), f"--rpc_port={MASTER_PORT}", f"--default_kv_lease_ttl={LEASE_TTL_MS}"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as master:
        try:
            time.sleep(1.0)
            store = connect(host, f"{host}:{MASTER_PORT}", SEGMENT_BYTES)
            say(f"{host}:{MASTER_PORT}")
            sys.stdin.read()
            store.close()
        finally:
            master.kill()


class Client:
    """Moves batches between its own buffer and the segment."""

    def __init__(self, host: str, master: str) -> None:
        self._store = connect(host, master, 0)
        self._memory = np.frombuffer(np.random.default_rng(0).bytes(1 << 20) * (BATCHES * 64), dtype=np.uint8).copy()
        self._held: deque[tuple[float, list[str]]] = deque()
        assert self._store.register_buffer(self._memory.ctypes.data, self._memory.nbytes) == 0

    def do(self, way: str, batch: int, size: int) -> tuple[float, float]:
        """Move one batch; when it began and ended. Each batch is put once and got once."""
        count = BATCH_BYTES // size
        keys = [f"{size}/{batch}/{i}" for i in range(count)]
        base = self._memory.ctypes.data + (batch % BATCHES) * BATCH_BYTES
        places = [base + i * size for i in range(count)]
        if way == "put":
            self._make_room()
        move = self._store.batch_put_from if way == "put" else self._store.batch_get_into
        start_s = time.perf_counter()
        codes = move(keys, places, [size] * count)
        end_s = time.perf_counter()
        assert set(codes) == {0 if way == "put" else size}, set(codes)
        if way == "get":
            self._held.append((end_s + 1.5 * LEASE_TTL_MS / 1000, keys))
        return start_s, end_s

    def _make_room(self) -> None:
        while self._held and (len(self._held) >= HELD_MAX or self._held[0][0] < time.perf_counter()):
            until_s, keys = self._held.popleft()
            time.sleep(max(0.0, until_s - time.perf_counter()))
            for key in keys:
                self._store.remove(key)


def say(answer: Any) -> None:
    """One line to the parent, past whatever the library prints."""
    _answers.write(json.dumps(answer) + "\n")
    _answers.flush()


def main(role: str, host: str, master: str = "") -> None:
    """Be the server or a client."""
    if role == "serve":
        serve(host)
        return
    client = Client(host, master)
    say("ready")
    for line in sys.stdin:
        command = json.loads(line)
        say(client.do(command["way"], command["batch"], command["size"]))


if __name__ == "__main__":
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library logs there
    main(*sys.argv[1:])
