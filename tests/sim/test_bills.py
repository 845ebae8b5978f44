"""What a busy fleet costs adds up, whoever is killed: real shells, fake engines, virtual time."""

import asyncio
import random

import msgspec
import pytest

from router.dispatch.bill_keeper import STALE_S
from sim.bills import SHARE_MAX, Sums, sums
from sim.faults import Crash, FaultPlan
from sim.run import Result, simulate
from sim.shape import FLEET
from sim.text import VOCAB
from sim.traces import Mix, context_max
from sim.world import World
from tests.sim.test_deadlines import in_world
from tests.sim.test_forks import ask, request
from tracehaul.engine.fake import fake_info
from tracehaul.wire.steps import Sampling
from worker.meter import TOLD_S

BUSY = Mix(
    traces=24,
    steps_min=6,
    steps_max=10,
    system_tokens_max=40,
    new_tokens_max=40,
    output_tokens_max=80,
    think_mean_s=0.3,
    spread_s=2.0,
    fork_share=0.1,
    hang_up_share=0.1,
    long_gap_share=0.0,
)
ANSWER = Sampling(max_tokens=60, temperature=0.0)
SETTLED_S = 20.0
BEAT_S = 1.0
"""Of a worker that lives, what it has not said yet."""


def kills(seed: int) -> FaultPlan:
    """Every few seconds a router, or both, and a worker at once or soon after: there may be nobody then to hear it."""
    rng = random.Random(f"kills {seed}")
    faults: list[Crash] = []
    at_s = 4.0
    while at_s < 24.0:
        for router in rng.sample(FLEET.routers, rng.choice([1, 2])):
            faults.append(Crash(at_s, router, rng.uniform(0.5, 3.0)))
        faults.append(Crash(at_s + rng.choice([0.0, rng.random()]), rng.choice(FLEET.workers), rng.uniform(0.5, 2.0)))
        at_s += rng.uniform(3.0, 5.0)
    return FaultPlan(tuple(sorted(faults, key=lambda fault: fault.at_s)), 0.0, 0.0005, 0.0005)


def busy(seed: int, plan: FaultPlan) -> tuple[Result, Sums, World]:
    """A run, what it cost, and its world as it was left."""
    worlds: list[World] = []

    def prepare(world: World) -> None:
        worlds.append(world)
        longest = context_max(BUSY)
        engine = fake_info(context_max=longest, kv_tokens_max=6 * longest, vocab_size=VOCAB)
        world.shape = msgspec.structs.replace(world.shape, engine=engine)

    result = simulate(seed, mix=BUSY, plan=plan, prepare=prepare)
    assert worlds[0].bills is not None
    return result, worlds[0].bills, worlds[0]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2, 5])
def test_all_work_is_somebodys_with_workers_and_routers_killed(seed: int) -> None:
    result, found, world = busy(seed, kills(seed))
    assert not [finding for finding in result.findings if "] bills: " in finding]
    deaths = sum(engine.ended_s is not None for engine in world.engines())
    assert deaths >= 4
    assert found.worked > 10.0
    assert abs(found.unclaimed) <= SHARE_MAX * found.worked
    # What is not billed died with its worker, which had not told it.
    assert 0 <= found.worked - found.billed <= found.lost + SHARE_MAX * found.worked
    living = len(world.engines()) - deaths
    assert abs(found.there - found.written) <= SHARE_MAX * found.there + living * BEAT_S


def test_what_all_routers_took_with_them_is_billed_when_one_is_back() -> None:
    async def test(world: World) -> None:
        await asyncio.gather(*(ask(world, request(f"s-{at}", ANSWER)) for at in range(3)))
        for node in FLEET.routers:
            world.crash(world.lives[node])
        before = await sums(world.documents, world.engines())
        assert before.billed < 0.5 * before.worked, "they died too late to show anything"
        await asyncio.sleep(3 * TOLD_S)
        for node in FLEET.routers:
            world.start(node)
        await asyncio.sleep(SETTLED_S)
        found = await sums(world.documents, world.engines())
        assert found.billed == pytest.approx(found.worked)
        assert found.unclaimed == pytest.approx(0.0, abs=1e-6)
        assert found.lost == 0.0
        assert found.written == pytest.approx(found.there, abs=len(FLEET.workers) * (BEAT_S + STALE_S))

    in_world(test, local_tokens=200, kv_tokens=4096)
