"""A link that goes silent: nothing tells the two hosts, and when it comes back all goes on."""

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from bench.common.processes import two_places
from tracehaul.transfer.base import Copy

_spec = importlib.util.spec_from_file_location("transfer_peer", Path(__file__).parent / "transfer_peer.py")
assert _spec is not None
assert _spec.loader is not None
transfer_peer = sys.modules.setdefault("transfer_peer", importlib.util.module_from_spec(_spec))
if not hasattr(transfer_peer, "Peer"):
    _spec.loader.exec_module(transfer_peer)

NBYTES = 48 << 20


@contextlib.contextmanager
def two_hosts(kind: str) -> Generator[tuple[Any, Any, Callable[[bool], None]], None, None]:
    """Two processes on two emulated hosts, and what silences the link between them and lets it speak again.

    Where nobody may emulate hosts the peer is stopped instead, which is as silent.
    """
    with two_places() as (here, there, _):
        us = transfer_peer.Peer(kind, "us#1", NBYTES, place=here)
        peer = transfer_peer.Peer(kind, "peer#1", NBYTES, place=there)

        def silence(silent: bool) -> None:
            if here.command:
                namespace, device = here.command[-1], here.environment["UCX_NET_DEVICES"]
                state = "down" if silent else "up"
                subprocess.run(["ip", "-n", namespace, "link", "set", device, state], check=True)
            elif silent:
                peer.freeze()
            else:
                peer.thaw()

        try:
            yield us, peer, silence
        finally:
            us.end()
            peer.end()


def outcome(call: Any) -> str:
    try:
        call.result()
    except transfer_peer.Failed as failure:
        return failure.code
    return "ok"


@pytest.mark.parametrize("kind", ["nixl", "ucxx"])
def test_a_silent_link_costs_deadlines_and_what_was_on_it_settles_when_it_is_back(kind: str) -> None:
    with two_hosts(kind) as (us, peer, silence):
        us.read(peer.descriptor, [Copy(0, 0, 100)])
        half = NBYTES // 2
        calls = [way(peer.descriptor, [Copy(half, half, half)], 1.0) for way in (us.start_read, us.start_write)]
        silence(True)
        assert {outcome(call) for call in calls} <= {"ok", "transfer_timeout"}
        assert outcome(us.start_read(peer.descriptor, [Copy(0, 0, 100)], 1.0)) == "transfer_timeout"
        assert not us.settled(0.0)
        assert us.ask("quarantined_bytes") >= 100
        silence(False)
        assert us.settled(30.0)
        assert us.ask("quarantined_bytes") == 0
        peer.poke(0, b"it is back")
        assert "ok" in [outcome(us.start_read(peer.descriptor, [Copy(0, 0, 10)], 5.0)) for _ in range(3)]
        assert us.peek(0, 10) == b"it is back"
