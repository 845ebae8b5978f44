import asyncio
import logging

import pytest

from router.fleet.members import MemberRegistry
from router.fleet.pools import Pool, pools_of, refusal
from sim import loop as virtual
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.wire.cluster import Members, NodeInfo, NodeLoad, Role
from tracehaul.wire.errors import WrongPool
from tracehaul.wire.ids import BlockHash, Generation, NodeId

ONE, OTHER = BlockHash(b"1" * 16), BlockHash(b"2" * 16)


def worker(name: str, pool: str = "a", model: str = "m", root: BlockHash = ONE, role: Role = "decode") -> NodeInfo:
    return NodeInfo(NodeId(name), Generation(1), role, f"{name}:1", model=model, pool=pool, root=root)


STORE = NodeInfo(NodeId("store-0"), Generation(1), "store", "store-0:1")


def test_a_pool_is_what_its_members_are() -> None:
    infos = [STORE, worker("d0"), worker("p0", role="prefill"), worker("d1", "b", "n", OTHER)]
    assert pools_of(infos) == {"m": Pool("a", "m", ONE), "n": Pool("b", "n", OTHER)}
    assert pools_of([STORE]) == {}


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (worker("d1", root=OTHER), "d1 has another KV layout than d0 of pool 'a'"),
        (worker("d1", model="n"), "d1 has another model than d0 of pool 'a'"),
        (worker("d1", "b", "m"), "serves 'm' in pool 'b', and d0 does so in another one"),
        (worker("p1", "", "m", role="prefill"), "in the pool that has no name, and d0"),
    ],
)
def test_who_does_not_fit_is_told_why_in_one_line(info: NodeInfo, words: str) -> None:
    why = refusal(info, [STORE, worker("d0")], {})
    assert why is not None
    assert words in why
    assert "\n" not in why


@pytest.mark.parametrize("info", [worker("d1"), worker("p0", role="prefill"), worker("d1", "b", "n", OTHER), STORE])
def test_who_fits_may_join(info: NodeInfo) -> None:
    assert refusal(info, [STORE, worker("d0")], {}) is None
    assert refusal(info, [STORE, worker("d0")], {"a": "m", "b": "n"}) is None


def test_the_next_life_of_a_pools_only_worker_may_be_another() -> None:
    assert refusal(worker("d0", root=OTHER), [STORE, worker("d0")], {}) is None


def test_a_fleet_that_was_set_up_takes_no_other_pools() -> None:
    assert "does not exist (there are 'a')" in (refusal(worker("d0", "b"), [], {"a": "m"}) or "")
    assert "which serves 'x'" in (refusal(worker("d0"), [], {"a": "x"}) or "")


def test_a_worker_that_does_not_fit_is_refused_aloud_and_stops_asking(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)

    async def main() -> None:
        network = LocalNetwork()
        registry = MemberRegistry(lambda _: None)
        await network.at("router:1").listen("router:1", registry)
        tasks: list[asyncio.Task[None]] = []
        for info in (worker("d0"), worker("d1", root=OTHER)):
            heard: list[Members] = []
            membership = Membership(Peers(network.at(info.address)), ["router:1"], info, NodeLoad, heard.append)
            tasks.append(asyncio.create_task(membership.run()))
            await asyncio.sleep(1.0)
        assert [member.node for member in registry.infos()] == ["d0"]
        assert not tasks[0].done()
        with pytest.raises(WrongPool, match="d1 has another KV layout than d0"):
            tasks[1].result()
        tasks[0].cancel()

    virtual.run(main)
    assert [record.getMessage() for record in caplog.records if record.name == "router.fleet.members"] == [
        "refused a node"
    ]
