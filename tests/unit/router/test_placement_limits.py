"""Placement by what each worker announced of itself."""

import pytest

from router.fleet.load import WorkerTable
from router.policy.cost import StoredRun
from tests.unit.router.test_placement import MUCH, RATES, G, choose, decode, fleet
from tracehaul.wire.cluster import NodeInfo, NodeLoad, WorkerLimits
from tracehaul.wire.ids import NodeId


def test_each_worker_computes_as_much_itself_as_it_announced() -> None:
    prefills = fleet("prefill", {})
    for node, local in ((0, 99), (1, 100)):
        decodes = fleet("decode", {"local": 99}, {"local": 100})
        placed = choose(decodes, prefills, prompt_tokens=100, asked=NodeId(f"decode-{node}"))
        assert placed.decode == decode(node)
        assert (placed.queued is None) == (local >= 100)
        assert (placed.decode_work_s > 0) == (local >= 100)


def test_what_a_worker_announced_counts_until_it_says_more() -> None:
    told = NodeInfo(NodeId("decode-0"), G, "decode", "x:1", rates=RATES)
    made = WorkerTable()
    made.sync([told], [NodeLoad()])
    assert made.token_s[0] == RATES.token_s
    made.sync([told], [NodeLoad(token_s=5.0)])
    assert made.token_s[0] == 5.0


def test_an_answer_goes_on_where_it_has_begun_unless_that_failed() -> None:
    decodes = fleet("decode", {}, {})
    for begun, avoided, chosen in ((0, (), 0), (1, (), 1), (1, (1,), 0)):
        failed = frozenset(decode(at) for at in avoided)
        placed = choose(decodes, begun=NodeId(f"decode-{begun}"), avoided=failed)
        assert placed.decode == decode(chosen)
        assert (placed.reason == "its answer has begun there") == (begun == chosen)


def test_a_step_holds_others_up_for_its_share_of_memory_that_is_not_given_way() -> None:
    infos = [
        NodeInfo(NodeId(f"decode-{n}"), G, "decode", "x:1", lacks=lacks, limits=WorkerLimits(kv_tokens_max=8200))
        for n, lacks in enumerate([("suspension",), ()])
    ]
    decodes = WorkerTable()
    decodes.sync(infos, [NodeLoad(**RATES._asdict(), free_tokens=MUCH)] * 2)
    stored = [StoredRun(4100, 0.0)]
    stock, own = (choose(decodes, asked=NodeId(f"decode-{n}"), stored=stored) for n in range(2))
    assert (stock.decode_work_s, own.decode_work_s) == pytest.approx((64 * 0.02 / 2, 0.0))
    assert (stock.waits_at, own.waits_at) == ((decode(0), stock.decode_work_s), None)
    assert choose(decodes, stored=stored, left=frozenset([decode(1)])).decode == decode(0)
    assert choose(decodes, asked=NodeId("decode-1"), left=frozenset([decode(1)])).decode == decode(1), "it waits there"
