"""Placement by what each worker announced of itself."""

from router.fleet.load import WorkerTable
from tests.unit.router.test_placement import RATES, G, choose, decode, fleet
from tracehaul.wire.cluster import NodeInfo, NodeLoad
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
