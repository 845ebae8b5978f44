"""Routers adapt a fleet to its work by themselves, and whatever dies in between: real shells, virtual time."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec

from router.adapt.loop import AdaptConfig, Change, Verdict
from router.dispatch.config import DispatchConfig
from router.dispatch.steps import Finished, Output, StepRequest
from router.fleet.flips import FlipConfig
from sim import loop as virtual
from sim.faults import FaultPlan
from sim.shape import ROLES, ROUTERS
from sim.text import VOCAB
from sim.world import World
from tests.sim import direct
from tests.sim.test_deadlines import idle
from tests.sim.test_flips import agreed, dispatch_of
from tracehaul.engine.fake import EngineCost, expected_output
from tracehaul.runtime import clock
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import NodeId, StepId, TraceId
from tracehaul.wire.steps import Sampling

SEED = 4
"""One whose database has no trouble."""
AGENTS = 12
COST = EngineCost(iteration_s=0.02, prefill_token_s=0.01, sequence_s=0.01, copy_token_s=0.00001)


class Work(NamedTuple):
    """What each step asks for."""

    prompt: int
    output: int


ANSWERS, LITTLE = Work(16, 100), Work(16, 8)


class Load:
    """Agents that ask one step after the other, each of a trace of its own; of a router that dies, the other one."""

    def __init__(self, world: World, work: Work, agents: int = AGENTS) -> None:
        self.work = work
        self.done = 0
        self.failed: list[str] = []
        self._world = world
        self._ends = False
        self._agents = [asyncio.ensure_future(self._agent(number)) for number in range(agents)]

    async def end(self) -> None:
        """Nothing new is asked, and all that was has ended."""
        self._ends = True
        await asyncio.gather(*self._agents)

    async def _agent(self, number: int) -> None:
        dice = random.Random(number)
        count = 0
        while not self._ends:
            count += 1
            prompt = [dice.randrange(VOCAB) for _ in range(self.work.prompt)]
            await self._step(f"a{number}-{count}", prompt, Sampling(max_tokens=self.work.output, temperature=0.0))
            await asyncio.sleep(dice.uniform(0.05, 0.15))

    async def _step(self, name: str, prompt: list[int], sampling: Sampling) -> None:
        request = StepRequest(StepId(name), TraceId(name), None, pack_tokens(prompt), sampling, final=True)
        while True:
            router = next(router for router in ROUTERS if self._world.lives[router].alive)
            life, tokens = self._world.lives[router], list[int]()
            events = direct.ask(self._world, request, router)
            while life.alive:
                try:
                    event = await asyncio.wait_for(events.get(), 1.0)
                except TimeoutError:
                    continue
                if isinstance(event, Output):
                    tokens += event.tokens
                elif not isinstance(event, Finished):
                    if event is not None or tokens != expected_output(prompt, sampling, VOCAB):
                        self.failed.append(f"{name}: {event}")
                    self.done += 1
                    return


def in_world(test: Callable[[World], Awaitable[None]], *, adapts: bool = True, drain_s: float = 0.5) -> None:
    async def main() -> None:
        world = World(SEED, FaultPlan((), 0.0, 0.0005, 0.0005))
        replace = msgspec.structs.replace
        worker = replace(world.shape.worker, local_prefill_tokens=0, chunk_tokens=64, sequences_max=32)
        engine = replace(world.shape.engine, context_max=512, kv_tokens_max=1 << 14)
        flips = FlipConfig(drain_s=drain_s, cooldown_s=2.0)
        dispatch = DispatchConfig(flips=flips, adapt=AdaptConfig(enabled=adapts))
        world.shape = replace(world.shape, worker=worker, engine=engine, dispatch=dispatch, cost=COST)
        lives = [world.start(node) for node in ROLES]
        await asyncio.gather(*(life.ready.wait() for life in lives))
        await asyncio.sleep(11)  # then each router knows that it knows everybody
        watching = asyncio.ensure_future(watch(world))
        await test(world)
        watching.cancel()
        await asyncio.sleep(30)
        idle(world)
        agreed(world)
        assert not world.findings.lines

    virtual.run(main, SEED)


async def watch(world: World) -> None:
    """As long as nobody dies there are workers of both roles that keep theirs, and one changes at a time."""
    while not world.graves:
        workers = [life.worker for life in world.lives.values() if life.worker is not None]
        world.roles.audit([(worker.service.node.role, worker.service.closed) for worker in workers])
        await asyncio.sleep(0.05)


def told(world: World, router: NodeId = ROUTERS[0]) -> list[Change | Verdict]:
    return [noted.what for noted in dispatch_of(world, router).adapting.noted]


def roles(world: World) -> dict[str, int]:
    found = [life.worker.service.node.role for life in world.lives.values() if life.worker is not None]
    return {role: found.count(role) for role in ("prefill", "decode")}


def done_in(work: Work, seconds: float, *, adapts: bool) -> tuple[int, dict[str, int]]:
    """Steps in that time, and the roles at its end."""
    found: list[tuple[int, dict[str, int]]] = []

    async def test(world: World) -> None:
        load = Load(world, work)
        await asyncio.sleep(seconds)
        found.append((load.done, roles(world)))
        await load.end()
        assert not load.failed
        assert bool(told(world)) == adapts
        assert not told(world, ROUTERS[1]), "one router alone does"

    in_world(test, adapts=adapts)
    return found[0]


def test_a_fleet_of_the_wrong_split_gets_the_right_one_and_does_more() -> None:
    fixed, same = done_in(ANSWERS, 80.0, adapts=False)
    ours, now = done_in(ANSWERS, 80.0, adapts=True)
    assert same == {"prefill": 2, "decode": 2}
    assert now == {"prefill": 1, "decode": 3}
    assert ours > 1.1 * fixed


def test_where_there_is_little_to_do_nothing_is_changed() -> None:
    async def test(world: World) -> None:
        load = Load(world, LITTLE, agents=2)
        await asyncio.sleep(90)
        await load.end()
        assert not load.failed
        assert not told(world)

    in_world(test)


async def turning(world: World) -> NodeId:
    """Whom the router is about to change, while that goes on."""
    adapting = dispatch_of(world).adapting
    until_s = clock.now_s() + 60.0
    while not adapting.turning:
        assert clock.now_s() < until_s, told(world)
        await asyncio.sleep(0.0005)
    (node,) = adapting.turning
    return node


def test_a_worker_killed_in_mid_change_is_no_reason_to_change_others_at_once() -> None:
    async def test(world: World) -> None:
        load = Load(world, ANSWERS)
        await asyncio.sleep(1)
        node = await turning(world)
        world.crash(world.lives[node])
        died_s = clock.now_s()
        await asyncio.sleep(0.5)
        change, verdict = told(world)
        assert isinstance(verdict, Verdict)
        assert (change.node, verdict.outcome) == (node, "refused")
        await asyncio.sleep(4)
        world.start(node)
        back_s = clock.now_s()
        await asyncio.sleep(10)
        assert len(told(world)) == 2, (died_s, back_s)
        await asyncio.sleep(60)
        await load.end()
        assert not load.failed
        assert len(told(world)) > 2

    in_world(test, drain_s=2.0)


def test_a_router_killed_in_mid_change_leaves_it_to_the_next() -> None:
    async def test(world: World) -> None:
        load = Load(world, ANSWERS)
        await asyncio.sleep(1)
        await turning(world)
        world.crash(world.lives[ROUTERS[0]])
        await asyncio.sleep(1)
        assert roles(world) == {"prefill": 2, "decode": 2}
        assert not told(world, ROUTERS[1])
        await asyncio.sleep(60)
        assert roles(world) == {"prefill": 1, "decode": 3}
        assert told(world, ROUTERS[1])
        world.start(ROUTERS[0])
        await asyncio.sleep(15)
        await load.end()
        assert not load.failed

    in_world(test, drain_s=2.0)
