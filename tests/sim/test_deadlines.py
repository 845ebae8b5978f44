"""Steps end at their deadline, wherever they wait: real shells, a fake engine, virtual time."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from prefill.worker import PrefillService
from router.dispatch.dispatch import Dispatch
from router.dispatch.steps import StepRequest
from router.traces.decisions import Ended
from sim import loop as virtual
from sim.faults import FaultPlan
from sim.nodes import Life
from sim.shape import ROLES
from sim.text import VOCAB
from sim.world import World
from tests.sim.test_forks import PROMPT, ask, computed, request
from tracehaul.engine.fake import expected_output
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.wire.errors import DeadlineExceeded
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import NodeId, StepId, TraceId
from tracehaul.wire.steps import DecodeStep, PrefillStep, Sampling
from worker.flights import Flights
from worker.host import WorkerHost

SEED = 3
LONG = Sampling(max_tokens=40, temperature=0.0)
OTHER = [token ^ 1 for token in PROMPT]


def in_world(test: Callable[[World], Awaitable[None]], *, local_tokens: int = 0, kv_tokens: int = 512) -> None:
    async def main() -> None:
        world = World(SEED, FaultPlan((), 0.0, 0.0005, 0.0005))
        replace = msgspec.structs.replace
        worker = replace(world.shape.worker, local_prefill_tokens=local_tokens, headroom_tokens=16)
        engine = replace(world.shape.engine, context_max=512, kv_tokens_max=kv_tokens)
        world.shape = replace(world.shape, worker=worker, engine=engine)
        lives = [world.start(node) for node in ROLES]
        await asyncio.gather(*(life.ready.wait() for life in lives))
        await asyncio.sleep(5)
        await test(world)

    virtual.run(main, SEED)


def life_of(world: World, name: str) -> Life:
    return next(life for life in world.lives.values() if life.node == name)


def host_of(world: World, name: str) -> WorkerHost:
    host = life_of(world, name).host
    assert host is not None
    return host


def dispatch_of(world: World) -> Dispatch:
    return next(life.dispatch for life in world.lives.values() if life.dispatch is not None)


def with_deadline(step: StepRequest, in_s: float) -> StepRequest:
    return msgspec.structs.replace(step, deadline_s=clock.now_s() + in_s)


async def ends_at(in_s: float, work: Awaitable[object]) -> None:
    """It fails at that deadline, as exactly as events have times."""
    began_s = clock.now_s()
    with pytest.raises(DeadlineExceeded):
        await work
    assert clock.now_s() - began_s == pytest.approx(in_s, abs=0.01)


def idle(world: World) -> None:
    """Nobody computes, waits, or holds what it does not keep for later."""
    for life in world.lives.values():
        if life.host is not None:
            assert (life.host.load().running, life.host.load().waiting, len(life.host.loop)) == (0, 0, 0)
            assert life.flights is not None
            assert len(life.flights) == 0


def test_a_step_that_waits_for_memory_ends_and_leaves_the_line() -> None:
    async def test(world: World) -> None:
        host, trace = host_of(world, "decode-0"), TraceId("hog")
        async with host.context(trace, trace, "", pack_tokens(PROMPT), 100):
            free = host.engine.free_tokens

            async def wait(in_s: float) -> None:
                other = TraceId("other")
                end_s = clock.now_s() + in_s
                async with host.context(other, other, "", pack_tokens(OTHER), 100, deadline_s=end_s):
                    raise AssertionError("there is no memory for it")

            waiting = asyncio.create_task(ends_at(2.0, wait(2.0)))
            await asyncio.sleep(1.0)
            assert host.load().waiting == 1
            await waiting
            assert (host.load().waiting, host.engine.free_tokens) == (0, free)
            await ends_at(0.0, wait(-1.0))
        await ends_at(0.0, wait(-1.0))  # though there is memory now
        # What ended stands in nobody's way.
        async with host.context(trace, trace, "", pack_tokens(OTHER), 100):
            assert host.load().running == 1

    in_world(test, kv_tokens=128)


@pytest.mark.parametrize("local_tokens", [0, 200])
def test_what_is_past_its_deadline_is_not_computed(local_tokens: int) -> None:
    async def test(world: World) -> None:
        await ends_at(0.0, ask(world, with_deadline(request("late", LONG), 0.0)))
        assert computed(world) == 0
        assert [type(entry.decision) for entry in dispatch_of(world).traces.get(("", TraceId("t"))).decisions] == [
            Ended
        ]

    in_world(test, local_tokens=local_tokens)


@pytest.mark.parametrize("local_tokens", [0, 200])
@pytest.mark.parametrize("in_s", [0.004, 0.012, 0.03, 0.1])
def test_a_running_step_is_cut_off_and_frees_everything(local_tokens: int, in_s: float) -> None:
    async def test(world: World) -> None:
        await ends_at(in_s, ask(world, with_deadline(request("cut", LONG), in_s)))
        await asyncio.sleep(0.05)  # an iteration that was under way ends
        before = computed(world)
        await asyncio.sleep(10)
        assert computed(world) == before
        idle(world)
        assert dispatch_of(world).stats.steps_moved == 0
        # The trace goes on, with what there is of it.
        answer = await ask(world, request("next", LONG))
        assert answer.tokens == expected_output(PROMPT, LONG, VOCAB)

    in_world(test, local_tokens=local_tokens)


def test_a_step_with_time_to_spare_is_as_any_other() -> None:
    async def test(world: World) -> None:
        answer = await ask(world, with_deadline(request("one", LONG), 60.0))
        assert answer.tokens == expected_output(PROMPT, LONG, VOCAB)

    in_world(test)


def test_everything_travels_to_both_workers_with_what_is_left_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PrefillStep] = []
    serve = PrefillService.stream

    def noting(self: PrefillService, told: Any, context: Any) -> Any:
        seen.append(told)
        return serve(self, told, context)

    monkeypatch.setattr(PrefillService, "stream", noting)

    async def test(world: World) -> None:
        step = with_deadline(request("one", Sampling(max_tokens=2, temperature=0.0)), 5.0)
        step = msgspec.structs.replace(step, tenant="acme", step_class="background", priority=-3)
        await ask(world, step)
        (told,) = seen
        assert (told.tenant, told.step_class, told.priority) == ("acme", "background", -3)
        assert told.deadline_in_s is not None
        assert 4.9 < told.deadline_in_s < 5.0

    in_world(test)


async def play(world: World, in_s: float, prefill: str | None) -> None:
    """A step straight to a decode worker, from a caller that leaves the deadline to it."""
    life, root = life_of(world, "decode-0"), host_of(world, "decode-0").root
    step = DecodeStep(
        step=StepId("s"),
        trace=TraceId("t"),
        root=root,
        prompt=pack_tokens(PROMPT),
        emitted=b"",
        salt="",
        home=None,
        prefill=None if prefill is None else NodeId(prefill),
        sampling=LONG,
        family=TraceId("t"),
        deadline_in_s=in_s,
    )
    async with aclosing(Peers(world.network.at("test:1")).stream(life.address, step, idle_timeout_s=60)) as replies:
        async for _ in replies:
            pass


def test_a_decode_worker_does_not_wait_for_a_frozen_prefill_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    async def freeze(self: PrefillService, told: Any, context: Any) -> AsyncGenerator[Any, None]:
        await asyncio.sleep(1000)
        yield

    monkeypatch.setattr(PrefillService, "stream", freeze)

    async def test(world: World) -> None:
        await ends_at(2.0, play(world, 2.0, "prefill-0"))
        assert computed(world) == 0, "nothing is computed in its place"
        assert host_of(world, "decode-0").stats.prefill_fallbacks == 0
        idle(world)

    in_world(test)


@pytest.mark.parametrize("prefill", ["prefill-0", None])
def test_workers_end_a_step_by_themselves(prefill: str | None) -> None:
    async def test(world: World) -> None:
        # Its prompt takes some 40 ms and each token 5, and what was computed is written back at the end.
        with pytest.raises(DeadlineExceeded):
            await play(world, 0.1, prefill)
        idle(world)
        assert computed(world) < len(PROMPT) + LONG.max_tokens - 10

    in_world(test)


def test_a_prefill_worker_ends_a_step_by_itself() -> None:
    async def test(world: World) -> None:
        life, host = life_of(world, "prefill-0"), host_of(world, "prefill-0")
        trace = TraceId("t")
        step = PrefillStep(
            StepId("s"), trace, host.root, pack_tokens(PROMPT), "", None, LONG, 0, trace, deadline_in_s=0.01
        )

        async def ask_it() -> None:
            stream = Peers(world.network.at("test:1")).stream(life.address, step, idle_timeout_s=60)
            async with aclosing(stream) as replies:
                async for _ in replies:
                    pass

        with pytest.raises(DeadlineExceeded):
            await ask_it()
        assert computed(world) == host.config.chunk_tokens, "the chunk that was under way, and no other"
        idle(world)

    in_world(test)


def test_a_step_waits_for_what_another_computes_no_longer_than_it_may() -> None:
    async def test(world: World) -> None:
        host, flights = host_of(world, "decode-0"), Flights()
        one, two = TraceId("one"), TraceId("two")
        async with host.context(one, one, "", pack_tokens(PROMPT), 100) as first:
            with flights.lead(first):
                end_s = clock.now_s() + 1.0
                async with host.context(two, two, "", pack_tokens(PROMPT), 100, deadline_s=end_s) as second:
                    await ends_at(1.0, flights.join(second))

    in_world(test)


@pytest.mark.parametrize("frozen", ["exists", "get"])
def test_a_frozen_store_holds_a_step_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch, frozen: str) -> None:
    async def freeze(*_: Any) -> None:
        await asyncio.sleep(1000)

    async def test(world: World) -> None:
        await ask(world, request("one", LONG))  # on decode-0: the store has it now
        host, trace = host_of(world, "decode-1"), TraceId("other")
        end_s = clock.now_s() + 1.0
        async with host.context(trace, trace, "", pack_tokens(PROMPT), 100, deadline_s=end_s) as here:
            if frozen == "get":
                await here.locate()
                assert here.stored_tokens() > 0
            with monkeypatch.context() as patch:
                patch.setattr(host.client, frozen, freeze)
                with pytest.raises(DeadlineExceeded):
                    await (here.pull(len(PROMPT) - 1) if frozen == "get" else here.locate())
            assert clock.now_s() == pytest.approx(end_s)
        assert host.client.staging.free == world.shape.worker.staging_blocks

    in_world(test)
