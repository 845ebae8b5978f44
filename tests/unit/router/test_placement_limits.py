"""Placement by what each worker announced of itself."""

import pytest

from router.fleet.load import WorkerTable
from router.policy.cost import OutputLengths, StoredRun
from tests.unit.router.test_placement import MUCH, RATES, G, busy, choose, decode, fleet, warm
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


@pytest.mark.parametrize(
    ("here", "there", "output", "chosen"),
    [
        (2, 0, 64, 1),
        (2, 0, 8, 0),  # that is soon over
        (1, 0, 64, 0),  # both fit
        (6, 0, 640, 1),
        (6, 2, 640, 1),  # there it fits when half of what is there has ended
        (6, 5, 640, 0),  # much must end wherever it goes
    ],
)
def test_who_would_wait_long_for_memory_goes_where_there_is_some(
    here: int, there: int, output: int, chosen: int
) -> None:
    decodes = fleet("decode", {"kv": 8200}, {"kv": 8200})
    for number, steps in enumerate((here, there)):
        for _ in range(steps):
            decodes.sent(decode(number), 0.0, 0.0, 4100)
    ask = {"warm": warm(0), "stored": [StoredRun(4000, 0.0)], "output_tokens": float(output)}
    assert choose(decodes, **ask).decode == decode(chosen)


def test_waiting_for_memory_takes_what_those_take_that_must_end_before() -> None:
    stored, output = [StoredRun(4100, 0.0)], 100.0
    free, full, unknown = (
        choose(busy(fleet("decode", {"kv": kv}), 0, decoding=3, each=2000), stored=stored, output_tokens=output).cost_s
        for kv in (10_100, 8100, 0)
    )
    assert full - free == pytest.approx(2000 / 6000 * output * 0.02 * 1.45)
    assert unknown == free


def test_what_steps_generate_is_learned_from_those_of_late() -> None:
    outputs = OutputLengths()
    assert outputs.tokens == 64
    for _ in range(500):
        outputs.ended(400)
    assert outputs.tokens == pytest.approx(400, rel=0.01)
