"""Workers change their roles while they serve, and whatever goes wrong in between: real shells, virtual time."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from router.dispatch.dispatch import Dispatch
from router.dispatch.flips import FlipOutcome
from router.dispatch.steps import StepRequest
from router.fleet.flips import FlipConfig
from sim import loop as virtual
from sim.faults import Cut, FaultPlan
from sim.shape import ROLES, ROUTERS
from sim.text import VOCAB
from sim.world import World
from tests.sim.test_deadlines import OTHER, idle
from tests.sim.test_forks import PROMPT, ask, request
from tracehaul.engine.fake import expected_output
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.wire.cluster import Flip
from tracehaul.wire.errors import WrongNode
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import NodeId, TraceId
from tracehaul.wire.steps import Sampling

SEED = 3
DRAIN_S = 0.5
LONG = Sampling(max_tokens=60, temperature=0.0)
BRIEF = Sampling(max_tokens=8, temperature=0.0)
FLIPPED = NodeId("decode-1")


def in_world(test: Callable[[World], Awaitable[None]], *, drain_s: float = DRAIN_S, local_tokens: int = 0) -> None:
    async def main() -> None:
        world = World(SEED, FaultPlan((), 0.0, 0.0005, 0.0005))
        replace = msgspec.structs.replace
        worker = replace(world.shape.worker, local_prefill_tokens=local_tokens, headroom_tokens=16, staging_blocks=64)
        engine = replace(world.shape.engine, context_max=512, kv_tokens_max=2048)
        flips = FlipConfig(drain_s=drain_s, cooldown_s=0.0)
        dispatch = replace(world.shape.dispatch, flips=flips)
        world.shape = replace(world.shape, worker=worker, engine=engine, dispatch=dispatch)
        lives = [world.start(node) for node in ROLES]
        await asyncio.gather(*(life.ready.wait() for life in lives))
        await asyncio.sleep(11)  # then each router knows that it knows everybody
        await test(world)
        await asyncio.sleep(30)
        idle(world)
        agreed(world)

    virtual.run(main, SEED)


def dispatch_of(world: World, router: NodeId = ROUTERS[0]) -> Dispatch:
    dispatch = world.lives[router].dispatch
    assert dispatch is not None
    return dispatch


def agreed(world: World) -> None:
    """Every router knows every worker as what it is, and nothing is under way."""
    for router in ROUTERS:
        known = {info.node: (info.role, info.role_epoch) for info in dispatch_of(world, router).members.infos()}
        for node, life in world.lives.items():
            if life.worker is not None:
                own = life.worker.service.node
                assert known[node] == (own.role, own.role_epoch), (router, node)
                assert not life.worker.load().turning
                assert not life.worker.service.closed


def flip(world: World, node: NodeId = FLIPPED, router: NodeId = ROUTERS[0]) -> "asyncio.Task[FlipOutcome]":
    task = world.turn(node, world.lives[router])
    assert task is not None
    return task


def role_of(world: World, node: NodeId = FLIPPED) -> str:
    worker = world.lives[node].worker
    assert worker is not None
    return worker.service.node.role


def step(name: str, trace: str, prompt: list[int], sampling: Sampling, decode: NodeId | None = FLIPPED) -> StepRequest:
    asked = msgspec.structs.replace(request(name, sampling), trace=TraceId(trace), prompt=pack_tokens(prompt))
    return msgspec.structs.replace(asked, decode=decode)


def test_a_worker_gets_the_other_role_and_all_routers_know_it_at_once() -> None:
    async def test(world: World) -> None:
        outcome = await flip(world)
        assert (outcome.flipped, outcome.role, outcome.why) == (True, "prefill", "")
        assert outcome.seconds < 0.2
        await asyncio.sleep(0.1)
        agreed(world)
        members = dispatch_of(world, ROUTERS[1]).members
        assert [info.node for info in members.live("prefill")] == ["decode-1", "prefill-0", "prefill-1"]
        info = members.known(FLIPPED)
        assert info is not None
        assert (info.role_epoch, info.limits.local_prefill_tokens) == (1, 0)
        # It is given prompts, by a decode worker that was told of it.
        worker = world.lives[FLIPPED].host
        assert worker is not None
        for n in range(12):
            prompt = [(n + token) % VOCAB for token in PROMPT]
            answer = await ask(world, step(f"s{n}", f"t{n}", prompt, BRIEF, None))
            assert answer.tokens == expected_output(prompt, BRIEF, VOCAB)
        assert worker.stats.steps > 0
        back = await flip(world)
        assert (back.flipped, back.role) == (True, "decode")
        answer = await ask(world, step("last", "t0", PROMPT, BRIEF))
        assert answer.tokens == expected_output(PROMPT, BRIEF, VOCAB)
        assert dispatch_of(world).stats.steps_moved == 0

    in_world(test)


@pytest.mark.parametrize("node", ["decode-1", "prefill-1"])
def test_hits_after_a_flip_are_those_of_before(node: str) -> None:
    """Each trace's next step has what the one before left, wherever that was."""

    async def test(world: World) -> None:
        prompts = {f"t{n}": [(n * 17 + token) % VOCAB for token in PROMPT] for n in range(8)}
        shares: list[float] = []
        for turn in range(4):
            cached = total = 0
            for name, prompt in prompts.items():
                answer = await ask(world, step(f"{name}-{turn}", name, prompt, BRIEF, None))
                assert answer.tokens == expected_output(prompt, BRIEF, VOCAB)
                assert answer.finished is not None
                cached += answer.finished.usage.computed_from
                total += len(prompt)
                prompts[name] = prompt + answer.tokens + [turn, 1, 2, 3]
            shares.append(cached / total)
            if turn == 2:
                assert (await flip(world, NodeId(node))).flipped
        assert shares[3] >= 0.97 * shares[2] > 0.5

    in_world(test)


@pytest.mark.parametrize("drain_s", [0.0, 0.1])
def test_what_does_not_end_in_time_goes_on_elsewhere_and_loses_nothing(drain_s: float) -> None:
    async def test(world: World) -> None:
        running = [
            asyncio.ensure_future(ask(world, step(f"s{n}", f"t{n}", [n, *PROMPT], LONG, FLIPPED))) for n in range(4)
        ]
        await asyncio.sleep(0.15)
        host = world.lives[FLIPPED].host
        assert host is not None
        assert host.load().running == 4
        outcome = await flip(world)
        assert outcome.flipped
        for n, answer in enumerate(await asyncio.gather(*running)):
            assert answer.tokens == expected_output([n, *PROMPT], LONG, VOCAB)
        dispatch = dispatch_of(world)
        assert (dispatch.stats.steps_moved, dispatch.stats.steps_failed) == (4, 0)
        assert host.stats.write_back_refused == 0
        engines = [life.engine for life in world.lives.values() if life.engine is not None]
        # Each token is sampled once, and what was computed is pulled: only a suspended step's last token is not.
        computed = sum(engine.computed_tokens for engine in engines)
        assert computed <= 4 * (len(PROMPT) + 1 + 60) + 4 * 2

    in_world(test, drain_s=drain_s, local_tokens=200)


def test_a_prompt_that_is_computed_there_is_computed_to_its_end_by_who_asked() -> None:
    async def test(world: World) -> None:
        answers = [
            asyncio.ensure_future(ask(world, step(f"s{n}", f"t{n}", [n, *PROMPT], BRIEF, NodeId("decode-0"))))
            for n in range(6)
        ]
        await asyncio.sleep(0.01)
        outcome = await flip(world, NodeId("prefill-0"))
        assert outcome.flipped
        for n, answer in enumerate(await asyncio.gather(*answers)):
            assert answer.tokens == expected_output([n, *PROMPT], BRIEF, VOCAB)
        assert dispatch_of(world).stats.steps_failed == 0

    in_world(test, drain_s=0.0)


def test_two_routers_never_take_the_last_two_at_once() -> None:
    async def test(world: World) -> None:
        outcomes = await asyncio.gather(
            flip(world, NodeId("decode-0"), ROUTERS[0]), flip(world, NodeId("decode-1"), ROUTERS[1])
        )
        flipped = sum(outcome.flipped for outcome in outcomes)
        assert flipped <= 1
        await asyncio.sleep(1)
        agreed(world)
        assert "decode" in {role_of(world, NodeId("decode-0")), role_of(world, NodeId("decode-1"))}

    in_world(test)


def test_two_routers_that_want_the_same_get_it_once() -> None:
    async def test(world: World) -> None:
        outcomes = await asyncio.gather(*(flip(world, FLIPPED, router) for router in ROUTERS))
        assert sum(outcome.flipped for outcome in outcomes) >= 1
        worker = world.lives[FLIPPED].worker
        assert worker is not None
        assert (worker.service.node.role, worker.service.node.role_epoch) == ("prefill", 1)

    in_world(test)


def test_an_order_for_another_life_or_another_role_epoch_is_refused() -> None:
    async def test(world: World) -> None:
        info = dispatch_of(world).members.known(FLIPPED)
        assert info is not None
        assert (await flip(world)).flipped
        assert (await flip(world)).flipped
        peers = Peers(world.network.at("late:1"))
        for generation, epoch, role_epoch in (
            (info.generation, info.epoch, 0),
            (info.generation, info.epoch, 1),
            (info.generation + 1, info.epoch, 2),
            (info.generation, info.epoch - 1, 2),
        ):
            order = Flip(type(info.generation)(generation), type(info.epoch)(epoch), role_epoch, "prefill", 0.0)
            with pytest.raises(WrongNode):
                await anext(peers.stream(info.address, order, idle_timeout_s=5.0))
        assert role_of(world) == "decode"

    in_world(test)


def busy(world: World) -> "list[asyncio.Task[object]]":
    """The worker that is to change has work for seconds."""
    return [
        asyncio.ensure_future(ask(world, step(f"b{n}", f"b{n}", [n, *OTHER], Sampling(400, temperature=0.0))))
        for n in range(2)
    ]


def test_a_worker_killed_in_mid_flip_is_gone_and_its_next_life_has_the_first_role() -> None:
    async def test(world: World) -> None:
        running = busy(world)
        await asyncio.sleep(0.1)
        outcome = flip(world)
        await asyncio.sleep(0.3)
        assert not outcome.done()
        world.crash(world.lives[FLIPPED])
        told = await outcome
        assert not told.flipped
        assert "no member any more" in told.why
        await asyncio.sleep(1)
        world.start(FLIPPED)
        for answer in await asyncio.gather(*running):
            assert len(answer.tokens) == 400  # type: ignore[attr-defined]
        await asyncio.sleep(1)
        assert role_of(world) == "decode"

    in_world(test, drain_s=30.0)


def test_a_worker_frozen_in_mid_flip_keeps_its_role() -> None:
    async def test(world: World) -> None:
        running = busy(world)
        await asyncio.sleep(0.1)
        outcome = flip(world)
        await asyncio.sleep(0.2)
        freezing = asyncio.ensure_future(world._freeze(world.lives[FLIPPED], 25.0))
        told = await outcome
        assert not told.flipped
        assert clock.now_s() < 40
        others = dispatch_of(world).members
        assert [info.node for info in others.live("decode")] == ["decode-0"]
        await freezing
        await asyncio.gather(*running)
        await asyncio.sleep(5)
        assert role_of(world) == "decode"
        assert [info.node for info in others.live("decode")] == ["decode-0", "decode-1"]

    in_world(test)


def test_a_router_killed_in_mid_flip_calls_it_off() -> None:
    async def test(world: World) -> None:
        busy(world)
        await asyncio.sleep(0.1)
        flip(world, FLIPPED, ROUTERS[1])
        await asyncio.sleep(0.2)
        worker = world.lives[FLIPPED].worker
        assert worker is not None
        assert worker.service.closed
        world.crash(world.lives[ROUTERS[1]])
        await asyncio.sleep(1)
        assert not worker.service.closed
        assert role_of(world) == "decode"
        assert FLIPPED in [info.node for info in dispatch_of(world).members.live("decode")]
        world.start(ROUTERS[1])
        await asyncio.sleep(15)

    in_world(test, drain_s=5.0)


def test_a_flip_whose_answer_comes_too_late_is_told_as_what_it_is() -> None:
    """What the worker says of itself by its membership counts, and each router hears it when it can."""

    async def test(world: World) -> None:
        other = dispatch_of(world, ROUTERS[1]).members
        running = flip(world)
        await asyncio.sleep(0.003)  # the order is on its way
        cut = Cut(clock.now_s(), FLIPPED, ROUTERS[0], 8.0)
        world.weather.begin(cut)
        outcome = await running
        world.weather.end(cut)
        await asyncio.sleep(15)
        agreed(world)
        known = other.known(FLIPPED)
        assert known is not None
        assert known.role == role_of(world)
        assert outcome.flipped == (outcome.role == "prefill")

    in_world(test)


def test_where_restarts_have_left_nobody_to_decode_a_worker_goes_back() -> None:
    async def test(world: World) -> None:
        assert (await flip(world, NodeId("prefill-0"))).flipped
        assert (await flip(world, NodeId("decode-0"))).flipped
        assert (await flip(world, NodeId("decode-1"))).flipped
        world.crash(world.lives[NodeId("prefill-0")])
        await asyncio.sleep(0.5)
        world.start(NodeId("prefill-0"))
        await asyncio.sleep(3)
        roles = {node: role_of(world, NodeId(node)) for node in ("prefill-0", "decode-0", "decode-1")}
        assert sorted(roles.values()) == ["decode", "prefill", "prefill"]
        assert roles["prefill-0"] == "prefill"
        answer = await ask(world, step("after", "after", PROMPT, BRIEF, None))
        assert answer.tokens == expected_output(PROMPT, BRIEF, VOCAB)

    in_world(test)
