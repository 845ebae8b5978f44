"""What only real processes show: identity of memory, rules for NIXL, idle cost."""

import importlib.util
import io
import os
import pickle
import subprocess
import sys
import time  # noqa: TID251 - measures other processes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tracehaul.transfer.base import Copy
from tracehaul.transfer.shm import ShmPayload

_spec = importlib.util.spec_from_file_location("transfer_peer", Path(__file__).parent / "transfer_peer.py")
assert _spec is not None
assert _spec.loader is not None
transfer_peer = sys.modules.setdefault("transfer_peer", importlib.util.module_from_spec(_spec))
if not hasattr(transfer_peer, "Peer"):
    _spec.loader.exec_module(transfer_peer)
Failed = transfer_peer.Failed


@pytest.fixture
def peers() -> Iterator[list[Any]]:
    """Processes to end after the test."""
    started: list[Any] = []
    yield started
    for peer in started:
        peer.end()


def test_shm_never_takes_one_memory_for_another(peers: list[Any]) -> None:
    us, peer = transfer_peer.Peer("shm", "us#1", 1 << 20), transfer_peer.Peer("shm", "peer#1", 1 << 20)
    peers += [us, peer]
    payload = msgspec.msgpack.decode(peer.descriptor.payload, type=ShmPayload)
    own = msgspec.msgpack.decode(us.descriptor.payload, type=ShmPayload)
    forgeries = {
        "a reused pid": (msgspec.structs.replace(payload, started=payload.started + 1), "transfer_lost"),
        "a reused descriptor": (msgspec.structs.replace(payload, link=own.link), "transfer"),
        "another descriptor": (msgspec.structs.replace(payload, fd=0), "transfer"),
        "no descriptor": (msgspec.structs.replace(payload, fd=999), "transfer"),
        "another host": (msgspec.structs.replace(payload, host="elsewhere"), "transfer"),
        "no process": (msgspec.structs.replace(payload, pid=1 << 30), "transfer_lost"),
        "an impossible process": (msgspec.structs.replace(payload, pid=-1), "transfer_lost"),
    }
    for name, (forged, code) in forgeries.items():
        remote = msgspec.structs.replace(peer.descriptor, payload=msgspec.msgpack.encode(forged))
        with pytest.raises(Failed) as failure:
            us.read(remote, [Copy(0, 0, 10)], 2.0)
        assert failure.value.code == code, name
    with pytest.raises(Failed) as failure:
        us.read(msgspec.structs.replace(peer.descriptor, nbytes=2 << 20), [Copy(0, 0, 10)], 2.0)
    assert failure.value.code == "transfer"


def test_shm_unmaps_a_dead_peer_without_being_asked(peers: list[Any]) -> None:
    us, peer = transfer_peer.Peer("shm", "us#1", 1 << 20), transfer_peer.Peer("shm", "peer#1", 1 << 20)
    peers += [us, peer]
    us.read(peer.descriptor, [Copy(0, 0, 10)])
    assert us.ask("mapped") == 1
    maps = Path(f"/proc/{us.process.pid}/maps")
    link = msgspec.msgpack.decode(peer.descriptor.payload, type=ShmPayload).link
    assert link in maps.read_text()
    peer.kill()
    for _ in range(200):
        if us.ask("mapped") == 0 and link not in maps.read_text():
            return
        time.sleep(0.01)
    raise AssertionError("still mapped")


@pytest.mark.parametrize("kind", ["nixl", "ucxx"])
def test_idle_agents_cost_next_to_nothing(peers: list[Any], kind: str) -> None:
    """Against two of their kind that look every millisecond."""
    pairs: list[list[Any]] = []
    for nap_s in (None, 0.001):
        pair = [transfer_peer.Peer(kind, f"{name}#1", 1 << 20, nap_s=nap_s) for name in ("us", "peer")]
        peers += pair
        pairs.append(pair)
        for one, other in (pair, pair[::-1]):
            one.read(other.descriptor, [Copy(0, 0, 10)])
    time.sleep(0.5)
    before = [cpu_s(pair) for pair in pairs]
    time.sleep(2.0)
    idle_s, restless_s = (cpu_s(pair) - began_s for pair, began_s in zip(pairs, before, strict=True))
    assert idle_s < restless_s / 4


def cpu_s(pair: list[Any]) -> float:
    """Of both processes until now."""
    return sum(node.send("cpu").result() for node in pair)


@pytest.mark.parametrize("kind", ["nixl", "ucxx"])
def test_a_quiet_owner_notices_a_request_at_once(peers: list[Any], kind: str) -> None:
    us, peer = transfer_peer.Peer(kind, "us#1", 1 << 20), transfer_peer.Peer(kind, "peer#1", 1 << 20, nap_s=600.0)
    peers += [us, peer]
    assert kind == "ucxx" or us.ask("pull") == "request"
    us.read(peer.descriptor, [Copy(0, 0, 10)])
    for _ in range(3):
        time.sleep(0.3)
        us.read(peer.descriptor, [Copy(0, 0, 10)], 30.0)  # it naps far longer: it is woken


def test_the_nixl_agent_is_made_by_the_rules() -> None:
    program = """
import resource, sys
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from tracehaul.transfer.nixl import PROGRESS_DELAY_US, NixlAgent
agent = NixlAgent("rules#1")
assert agent.strict
assert agent.config.useProgThread and agent.config.pthrDelay == PROGRESS_DELAY_US >= 5000
assert not agent.config.useListenThread
assert agent.wake_fds
assert "torch" not in sys.modules
agent.close()
print("ok", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environ = {**os.environ, "UCX_TLS": "tcp"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("ok"), done.stderr


def test_ucxx_leaves_the_environment_alone_and_needs_no_torch() -> None:
    program = """
import os, sys
before = dict(os.environ)
from tracehaul.transfer.ucxx import UcxxAgent
agent = UcxxAgent("rules#1")
assert dict(os.environ) == before
assert "torch" not in sys.modules
assert agent.wake_fds and not agent.heard() and agent.arm() == "armed"
agent.close()
print("ok")
"""
    environ = {**os.environ, "UCX_TLS": "tcp"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("ok"), done.stderr


class _Mine:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.write, (2, b"unpickled\n"))


def test_no_payload_is_ever_unpickled(peers: list[Any]) -> None:
    """A pickle that would run code, wherever peers' bytes go in; and no module of ours imports pickle."""
    folder = Path(transfer_peer.__file__).parents[2] / "tracehaul" / "transfer"
    sources = [path.read_text() for path in folder.glob("*.py")]
    assert len(sources) >= 8
    assert not any("pickle" in line for text in sources for line in text.splitlines() if "import" in line)
    assert not any("serialize_descs" in text or "get_serialized_descs" in text for text in sources)
    stream = io.BytesIO()
    pickle.dump(_Mine(), stream)
    us = transfer_peer.Peer("nixl", "us#1", 1 << 20)
    peers.append(us)
    remote = msgspec.structs.replace(us.descriptor, owner="evil#1", payload=stream.getvalue())
    with pytest.raises(Failed) as failure:
        us.read(remote, [Copy(0, 0, 10)], 2.0)
    assert failure.value.code == "transfer"
