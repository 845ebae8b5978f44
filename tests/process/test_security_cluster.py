"""A cluster of real processes, all plain and all encrypted: what is on the wire, where it listens, whom it takes."""

import mmap
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bench.common.fleet import Fleet
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port, restart
from cluster.plan import load_plan
from cluster.rundir import ClusterFault
from cluster.security.ca import retire, rotate
from cluster.security.config import SecurityConfig
from cluster.security.laying import AUTHORITY, LOCAL, certify, lay, lay_ca
from cluster.security.secrets import FOLDER, TOKEN_FILE
from tracehaul.runtime import clock
from tracehaul.transfer.memory import FILE_PREFIX
from tracehaul.wire.hashing import pack_tokens
from worker.config import WorkerConfig

PROMPT_TOKENS = 200
SAMPLE_BYTES = 64
SAMPLES = 200
HEARTBEAT_S = 2.0
"""By then a router has heard that a node which says ready serves."""

SECURITY = {
    "plain": SecurityConfig(),
    "encrypted": SecurityConfig(control="mtls", data="tls", token=True),
}
answers: dict[str, list[int]] = {}

pytestmark = [pytest.mark.xdist_group("security"), pytest.mark.slow]


@pytest.fixture(scope="module", params=list(SECURITY))
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def config(way: str) -> ClusterConfig:
    return ClusterConfig(
        port=free_port(),
        transport="tcp",
        nodes=NodeCounts(prefill=1, decode=1, store=1),
        kv_tokens=1024,
        store_bytes=64 << 20,
        worker=WorkerConfig(headroom_tokens=32, local_prefill_tokens=32),
        security=SECURITY[way],
    )


def prompt(seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)]


def pids(cluster: Fleet) -> dict[str, int]:
    return {record.name: record.pid for record in cluster.run.records()}


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses and ports on which a process takes TCP connections, as the kernel tells."""
    inodes: set[str] = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(fd)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found: set[tuple[str, int]] = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                packed, _, port = fields[1].partition(":")
                words = struct.pack(f"<{len(packed) // 8}I", *np.frombuffer(bytes.fromhex(packed), ">u4").tolist())
                found.add((socket.inet_ntop(family, words), int(port, 16)))
    return found


class Wire:
    """What goes over the loopback interface from and to some ports."""

    def __init__(self, ports: set[int]) -> None:
        self._ports = ports
        self._streams: dict[tuple[int, int], list[bytes]] = {}
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        except PermissionError:
            pytest.skip("only root may listen to an interface")
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 256 << 20)  # SO_RCVBUFFORCE
        self._socket.bind(("lo", 0))
        self._socket.settimeout(0.2)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                packet, (_, _, kind, *_) = self._socket.recvfrom(1 << 18)
            except TimeoutError:
                if self._ending.is_set():
                    return
                continue
            if kind != socket.PACKET_OUTGOING or packet[12:14] != b"\x08\x00" or packet[23] != socket.IPPROTO_TCP:
                continue
            tcp = 14 + (packet[14] & 0xF) * 4
            source, target = struct.unpack_from(">HH", packet, tcp)
            if source in self._ports or target in self._ports:
                self._streams.setdefault((source, target), []).append(packet[tcp + (packet[tcp + 12] >> 4) * 4 :])

    def end(self) -> list[bytes]:
        """Each direction of each connection."""
        self._ending.set()
        self._thread.join()
        self._socket.close()
        return [b"".join(parts) for parts in self._streams.values()]


@contextmanager
def memory_of(pid: int, name: str) -> Generator[memoryview]:
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(fd).startswith(f"/memfd:{FILE_PREFIX}{name}"):
            with fd.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                with memoryview(mapped) as view:
                    yield view
                return
    pytest.fail(f"no memory of {name}")


def some_of(memory: memoryview) -> list[bytes]:
    """Pieces of what was stored, none of which is there by chance."""
    generator = random.Random(1)
    pieces: set[bytes] = set()
    while len(pieces) < SAMPLES:
        at = generator.randrange(0, 4 << 20)
        piece = bytes(memory[at : at + SAMPLE_BYTES])
        if len(set(piece)) > SAMPLE_BYTES // 2:
            pieces.add(piece)
    return list(pieces)


def test_tokens_and_kv_are_seen_on_the_wire_when_plain_and_only_then(cluster: Fleet, way: str) -> None:
    tokens = prompt(1)
    nodes = pids(cluster)
    states = {name: cluster.run.state(name) for name in nodes}
    pages = {int(state.metrics.rpartition(":")[2]) for state in states.values()}
    ports = {port for pid in nodes.values() for _, port in listening(pid)} - pages
    wire = Wire(ports)
    threading.Event().wait(HEARTBEAT_S)
    step = cluster.step("seen", tokens, 8)
    threading.Event().wait(0.5)
    streams = wire.end()
    answers[way] = step.tokens
    assert step.moved["pulled_tokens"] > 0, "its KV went to a store and came from there"
    with memory_of(nodes["store-0"], "store-0") as memory:
        pieces = some_of(memory)
    assert sum(map(len, streams)) > 2 * len(pieces) * SAMPLE_BYTES
    assert max(map(len, streams)) > 1 << 20, "the blocks went this way"
    packed = pack_tokens(tokens)
    told = sum(packed[:64] in stream for stream in streams)
    seen = sum(any(piece in stream for stream in streams) for piece in pieces)
    if way == "plain":
        assert told > 0
        assert seen > SAMPLES // 2
    else:
        assert told == 0
        assert seen == 0
        with pytest.raises(StopIteration):
            next(s for s in streams if (cluster.run.path / FOLDER / TOKEN_FILE).read_bytes().strip() in s)
    if len(answers) == len(SECURITY):
        assert answers["plain"] == answers["encrypted"]


def test_each_node_listens_where_the_plan_says_and_nowhere_else(cluster: Fleet) -> None:
    plan = load_plan(cluster.run)
    for name, pid in pids(cluster).items():
        spec, state = plan.node(name), cluster.run.state(name)
        found = listening(pid)
        hosts = {spec.listen, plan.config.host if spec.role == "router" else plan.config.metrics_host}
        assert {host for host, _ in found} <= hosts, found
        for address in (state.address, state.metrics):
            host, _, port = address.rpartition(":")
            assert (host, int(port)) in found
        assert len(found) == (2 if spec.role == "router" else 3), "control plane, data plane, metrics"


def test_commands_reach_the_nodes(cluster: Fleet) -> None:
    for words in (["describe"], ["bench", "--bytes", "8MiB"]):
        command = [sys.executable, "-m", "cluster.cli", "store", *words, "--run-dir", str(cluster.run.path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "store-0" in done.stdout


def test_a_wrong_join_token_is_one_line_at_both_ends(cluster: Fleet, way: str) -> None:
    if way == "plain":
        return
    file = cluster.run.path / FOLDER / TOKEN_FILE
    right = file.read_bytes()
    file.write_bytes(b"wrong\n")
    try:
        with pytest.raises(ClusterFault, match=r"^store-0: the router refuses store-0: its join token is wrong$"):
            restart(cluster.run, ["store-0"], Console(quiet=True))
    finally:
        file.write_bytes(right)
    log = cluster.run.log("router-0").read_text()
    assert [line for line in log.splitlines() if "refused a node" in line and "its join token is wrong" in line]
    restart(cluster.run, ["store-0"], Console(quiet=True))
    for name in pids(cluster):
        assert right.strip() not in cluster.run.log(name).read_bytes()
    assert right.strip() not in cluster.run.plan_file.read_bytes()


def test_the_ca_is_replaced_under_steps(cluster: Fleet, way: str) -> None:
    if way == "plain":
        return
    secrets, authority = cluster.run.path / FOLDER, cluster.run.path / AUTHORITY
    specs = load_plan(cluster.run).nodes
    failed: list[BaseException] = []
    done = 0
    ending = threading.Event()

    def steps() -> None:
        nonlocal done
        try:
            while not ending.is_set():
                cluster.step(f"rotating-{done}", prompt(100 + done), 4)
                done += 1
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=steps)
    thread.start()
    try:
        for change in (
            lambda: lay_ca(secrets, rotate(authority, now_s=clock.wall_s())),
            lambda: lay(secrets, certify(authority, LOCAL, specs, now_s=clock.wall_s())),
            lambda: lay_ca(secrets, retire(authority)),
        ):
            change()
            threading.Event().wait(2.5)  # each node looks once a second
    finally:
        ending.set()
        thread.join()
    assert not failed
    assert done > 3
    for name, pid in pids(cluster).items():
        log = cluster.run.log(name).read_text()
        assert log.count("new certificates are used") >= 3, name
        assert "refused a connection" not in log, name
        assert Path(f"/proc/{pid}").exists(), name
    restart(cluster.run, ["decode-0"], Console(quiet=True))
    threading.Event().wait(HEARTBEAT_S)
    assert cluster.step("rotated", prompt(1), 8).tokens == answers["encrypted"]
