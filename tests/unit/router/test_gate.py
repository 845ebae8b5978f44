"""What the fleet announces decides which steps the gate counts, and what a refusal says."""

from typing import cast

import pytest

from router.dispatch.gate import Gate, NotAdmitted
from router.dispatch.stats import DispatchStats
from router.dispatch.steps import StepRequest
from router.fleet.members import MemberRegistry
from router.http.errors import STATUS, headers_of
from router.http.translate import translate
from router.policy.admission import AdmissionConfig
from sim import loop as virtual
from tracehaul.wire.cluster import NodeInfo, NodeLoad, WorkerLimits
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import Generation, NodeId, StepId, TraceId
from tracehaul.wire.steps import Sampling, StepClass


class Fleet:
    """A worker of 100 tokens and a store node of twice as many."""

    def __init__(self) -> None:
        limits = WorkerLimits(kv_tokens_max=100)
        self._infos = {
            "decode": NodeInfo(NodeId("d"), Generation(1), "decode", "h:1", "m", limits=limits),
            "store": NodeInfo(NodeId("s"), Generation(1), "store", "h:2"),
        }
        self._loads = {NodeId("d"): NodeLoad(bytes_max=6400), NodeId("s"): NodeLoad(bytes_max=12800)}

    def live(self, role: str, pool: str | None = None) -> list[NodeInfo]:
        return [self._infos[role]] if role in self._infos else []

    def loads(self, infos: list[NodeInfo]) -> list[NodeLoad]:
        return [self._loads[info.node] for info in infos]


def gate(config: AdmissionConfig, *, stores: bool = False) -> Gate:
    return Gate(cast(MemberRegistry, Fleet()), config, DispatchStats(), stores=stores)


def step(
    trace: str, tokens: int, *, parent: str | None = None, step_class: StepClass = "standard", final: bool = False
) -> StepRequest:
    return StepRequest(
        StepId(f"{trace}/1"),
        TraceId(trace),
        TraceId(parent) if parent else None,
        pack_tokens([1] * tokens),
        Sampling(max_tokens=1),
        step_class=step_class,
        final=final,
    )


def test_a_refusal_is_a_429_that_says_when_and_what_belongs_to_admitted_traces_passes() -> None:
    async def main() -> None:
        at = gate(AdmissionConfig())
        at.enter(step("a", 96), known=False)
        with pytest.raises(NotAdmitted) as refused:
            at.enter(step("b", 10), known=False)
        failure = translate(refused.value)
        assert STATUS[failure.cause] == 429
        assert failure.code == "not_admitted"
        headers = headers_of(failure)
        assert int(headers["retry-after"]) >= 1
        assert f"expected to in {headers['x-begins-in-s']} s" in str(failure)
        at.enter(step("a", 10), known=True)
        at.enter(step("a.child", 10, parent="a"), known=False)
        at.enter(step("night", 10, step_class="background"), known=False)
        assert len(at.pool("")) == 2, "background is somebody else's business"
        at.leave(step("a", 96, final=True), 4)
        at.leave(step("a.child", 10, parent="a", final=True), 4)
        at.enter(step("b", 10), known=False)

    virtual.run(main)


def test_memory_is_what_workers_and_stores_announce() -> None:
    async def main() -> None:
        with_stores = gate(AdmissionConfig(), stores=True)
        with_stores.enter(step("a", 90), known=False)
        assert with_stores.pool("").wanted(0.0) == pytest.approx(0.9), "all of it wants the workers'"
        alone = gate(AdmissionConfig(enabled=False))
        for number in range(5):
            alone.enter(step(f"t{number}", 1000), known=False)
        assert len(alone.pool("")) == 0, "switched off, it counts nothing"

    virtual.run(main)
