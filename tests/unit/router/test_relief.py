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


class Waiting:
    """As much of a run as relief sees."""

    def __init__(self, *hashes: str) -> None:
        self.hashes = [BlockHash(name.encode()) for name in hashes]
        self.request = SimpleNamespace(step=StepId("-".join(hashes)))
        self.moved = False

    def move(self, *_: object) -> None:
        self.moved = True


def placed(cost_s: float, work_s: float) -> Placement:
    return Placement(
        decode=Key(NodeId("decode-0"), Generation(1)),
        helper=PREFILL,
        home=None,
        expected_tokens=0,
        pull_tokens=None,
        reason="",
        cost_s=cost_s,
        warm_cost_s=None,
        decode_work_s=0.0,
        prefill_work_s=work_s,
    )


def moved(*waiting: tuple[Waiting, float]) -> list[bool]:
    """After a look at runs that wait at one worker, each with its work there; any other place costs a second."""

    async def main() -> None:
        prefills = WorkerTable()
        prefills.sync(
            [NodeInfo(PREFILL.node, PREFILL.generation, "prefill", "x:1", limits=WorkerLimits(stretch=5.0))],
            [NodeLoad()],
        )
        relief = Relief(prefills, Predicted(), lambda run, key: placed(1.0, 0.0))
        for run, work_s in waiting:
            prefills.sent(PREFILL, work_s, 0.0)
            relief.enter(cast(Any, run), placed(0.0, work_s))
        await asyncio.sleep(0.6)
        relief.close()
        relief.enter(cast(Run, waiting[0][0]), placed(0.0, 1.0))  # too late, and harmless

    virtual.run(main)
    return [run.moved for run, _ in waiting]


def test_the_last_to_be_computed_goes_where_that_is_cheaper() -> None:
    assert moved((Waiting("a", "b", "c", "d"), 4.0), (Waiting("a", "k", "l", "m"), 5.0)) == [False, True]


def test_who_computes_what_others_wait_for_stays() -> None:
    parent = (Waiting("a", "b", "c", "d"), 5.0)
    children = [(Waiting("a", "b", "c", name), 0.1) for name in "xyz"]
    assert moved(parent, *children) == [False, False, False, False]
