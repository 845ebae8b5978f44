"""No trace costs more than its budget by more than an iteration: real shells, a fake engine, virtual time."""

import asyncio

import msgspec
import pytest

from router.dispatch.steps import StepRequest
from router.policy.prices import Limits
from sim.world import World
from tests.sim.test_deadlines import dispatch_of, idle, in_world
from tests.sim.test_forks import ask, request
from tracehaul.engine.fake import FAKE_LAYOUT
from tracehaul.wire.errors import BudgetExceeded
from tracehaul.wire.ids import NodeId, TraceId
from tracehaul.wire.steps import Sampling

LONG = Sampling(max_tokens=400, temperature=0.0)
KEY = ("", TraceId("t"))
ITERATION_S = 0.005
TOKEN_S = 0.0002


def allowed(name: str, budget: float, choices: int = 1) -> StepRequest:
    return msgspec.structs.replace(request(name, LONG), limits=Limits(budget), choices=choices)


def longest_s(world: World) -> float:
    """An iteration that computes as much of a prompt as it may."""
    return ITERATION_S + world.shape.worker.chunk_tokens * TOKEN_S


async def cost(world: World) -> float:
    await asyncio.sleep(3.0)  # workers have said what they know
    trace = dispatch_of(world).traces.get(KEY)
    assert trace is not None
    return trace.bill.amount


@pytest.mark.parametrize("budget", [0.001, 0.012, 0.03, 0.1])
@pytest.mark.parametrize("local_tokens", [0, 200], ids=["prefill worker", "decode worker"])
def test_a_step_ends_with_the_iteration_that_reaches_its_traces_budget(budget: float, local_tokens: int) -> None:
    async def test(world: World) -> None:
        with pytest.raises(BudgetExceeded):
            await ask(world, allowed("a", budget))
        assert budget <= await cost(world) <= budget + longest_s(world)
        idle(world)
        spent = await cost(world)
        with pytest.raises(BudgetExceeded, match="say a larger one"):
            await ask(world, allowed("b", budget))
        assert await cost(world) == spent
        answer = await ask(world, msgspec.structs.replace(allowed("c", 9.0), sampling=Sampling(max_tokens=2)))
        assert len(answer.tokens) == 2

    in_world(test, local_tokens=local_tokens)


def test_steps_at_once_keep_to_it_together() -> None:
    async def test(world: World) -> None:
        budget, steps = 0.2, 4
        asked = [ask(world, allowed(f"s-{at}", budget, steps - at)) for at in range(steps)]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(result, BudgetExceeded) for result in results)
        assert budget <= await cost(world) <= budget + longest_s(world)

    in_world(test, local_tokens=200, kv_tokens=4096)


def test_a_step_whose_worker_dies_keeps_to_it_on_the_next() -> None:
    async def test(world: World) -> None:
        budget = 1.5
        step = asyncio.ensure_future(ask(world, msgspec.structs.replace(allowed("a", budget), sampling=LONG)))
        await asyncio.sleep(1.2)
        world.crash(world.lives[NodeId("decode-0")])
        with pytest.raises(BudgetExceeded):
            await step
        assert await cost(world) <= budget + longest_s(world)

    in_world(test, local_tokens=200)


def test_what_a_dead_worker_computed_is_recompute_on_the_next() -> None:
    again = list[float]()

    async def test(world: World) -> None:
        step = asyncio.ensure_future(ask(world, request("a", LONG)))
        await asyncio.sleep(1.2 + 2 * ITERATION_S * len(again))
        world.crash(world.lives[NodeId("decode-0")])
        answer = await step
        await cost(world)
        trace = dispatch_of(world).traces.get(KEY)
        assert trace is not None
        spent = trace.bill.spent
        assert len(answer.tokens) == 400
        again.append(spent.recompute_s)
        assert 400 * ITERATION_S * 0.5 < spent.worker_s < 400 * ITERATION_S * 1.5

    for _ in range(2):
        in_world(test, local_tokens=500)
    # What the store has not, of what was said by then: less than a block, and not nothing each time.
    assert 0 < max(again) <= ITERATION_S + FAKE_LAYOUT.block_tokens * TOKEN_S
