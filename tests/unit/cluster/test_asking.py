"""What an operator's commands are told of the store's nodes."""

from pathlib import Path

import httpx
import msgspec
import pytest

from cluster import asking
from cluster.api import Api
from cluster.asking import StoreRef
from cluster.rundir import RunDir
from router.fleet.members import NodeStatus
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.ids import Generation, NodeId


def test_a_node_that_is_late_is_called_silent_and_for_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def status(name: str, health: str, age_s: float) -> NodeStatus:
        info = NodeInfo(NodeId(name), Generation(1), "store", f"{name}:1")
        return NodeStatus(info, NodeLoad(), health, age_s)

    statuses = [status("store-0", "ready", 0.2), status("store-1", "suspect", 4.4), status("store-2", "draining", 0.1)]

    def get(self: Api, path: str, timeout_s: float) -> httpx.Response:
        assert (self.url, self.key, path) == ("http://router:1", "secret", "/cluster")
        return httpx.Response(200, content=msgspec.json.encode(statuses), request=httpx.Request("GET", self.url))

    monkeypatch.setattr(Api, "get", get)
    found = asking.find("http://router:1", RunDir(tmp_path), "secret")
    assert found.stores == [
        StoreRef(NodeId("store-0"), "ready", "store-0:1"),
        StoreRef(NodeId("store-1"), "silent for 4 s", "store-1:1"),
        StoreRef(NodeId("store-2"), "draining", "store-2:1"),
    ]
