"""Whose prompts are taken elsewhere while they wait; places and prices are scripted, time is virtual."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from router.dispatch.predicted import Predicted
from router.dispatch.relief import Relief
from router.dispatch.run import Run
from router.fleet.load import Key, WorkerTable
from router.policy.placement import Placement
from sim import loop as virtual
from tracehaul.wire.cluster import NodeInfo, NodeLoad, WorkerLimits
from tracehaul.wire.ids import BlockHash, Generation, NodeId, StepId

PREFILL = Key(NodeId("prefill-0"), Generation(1))
DECODE = Key(NodeId("decode-0"), Generation(1))


class Waiting:
    """As much of a run as relief sees."""

    def __init__(self, *hashes: str) -> None:
        self.hashes = [BlockHash(name.encode()) for name in hashes]
        self.request = SimpleNamespace(step=StepId("-".join(hashes)))
        self.moved = False

    def move(self, *_: object) -> None:
        self.moved = True


def placed(cost_s: float, work_s: float, helper: Key | None = PREFILL) -> Placement:
    return Placement(
        decode=DECODE,
        helper=helper,
        home=None,
        expected_tokens=0,
        pull_tokens=None,
        reason="",
        cost_s=cost_s,
        warm_cost_s=None,
        decode_work_s=0.0 if helper else work_s,
        prefill_work_s=work_s if helper else 0.0,
        holds=helper is None,
    )


def moved(*waiting: tuple[Waiting, float], at: Key = PREFILL) -> list[bool]:
    """After a look at runs that wait at one worker, each with its work there; any other place costs a second."""
    helper = PREFILL if at == PREFILL else None

    async def main() -> None:
        tables = {key: WorkerTable() for key in (PREFILL, DECODE)}
        for key, role in ((PREFILL, "prefill"), (DECODE, "decode")):
            limits = WorkerLimits(stretch=5.0)
            tables[key].sync([NodeInfo(key.node, key.generation, cast(Any, role), "x:1", limits=limits)], [NodeLoad()])
        relief = Relief(list(tables.values()), Predicted(), lambda run, key: placed(1.0, 0.0))
        for run, work_s in waiting:
            tables[at].sent(at, work_s, 0.0)
            relief.enter(cast(Any, run), placed(0.0, work_s, helper))
        await asyncio.sleep(0.6)
        relief.close()
        relief.enter(cast(Run, waiting[0][0]), placed(0.0, 1.0))  # too late, and harmless

    virtual.run(main)
    return [run.moved for run, _ in waiting]


def test_the_last_to_be_computed_goes_where_that_is_cheaper() -> None:
    assert moved((Waiting("a", "b", "c", "d"), 4.0), (Waiting("a", "k", "l", "m"), 5.0)) == [False, True]


def test_who_waits_for_a_stock_servers_memory_goes_where_there_is_some() -> None:
    steps = (Waiting("a", "b"), 4.0), (Waiting("c", "d"), 5.0)
    assert moved(*steps, at=DECODE) == [False, True]
    assert moved(steps[0], at=DECODE) == [False], "it runs"


def test_who_computes_what_others_wait_for_stays() -> None:
    parent = (Waiting("a", "b", "c", "d"), 5.0)
    children = [(Waiting("a", "b", "c", name), 0.1) for name in "xyz"]
    assert moved(parent, *children) == [False, False, False, False]
