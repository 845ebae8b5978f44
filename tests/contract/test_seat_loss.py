"""What a seat over a stock server makes of one that dies, freezes, fails or lies; and where its steps go then."""

import asyncio
from contextlib import aclosing

import msgspec
import pytest

from router.dispatch.config import DispatchConfig
from router.dispatch.dispatch import Dispatch
from router.dispatch.steps import Finished, StepRequest
from tests.contract.test_seat import GREEDY, LONG, PROMPT, SLOW, expected
from tests.seats import LIMITS, PATIENT, QUICK, STOCK, Place, Sat, app_of, play, until
from tests.stock import Listening, StockEngine
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.wire.cluster import Members
from tracehaul.wire.errors import (
    CannotContinue,
    ClusterError,
    InvalidRequest,
    Overloaded,
    PeerLost,
    ProtocolError,
    TimedOut,
)
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import StepId, TraceId
from tracehaul.wire.steps import Sampling

MUCH = Sampling(300, **GREEDY)


async def killed(place: Place, sat: Sat) -> float:
    """Its server dies under a step; returns how long that took to end."""
    assert sat.listening is not None
    async with aclosing(place.stream(sat, place.request(PROMPT, MUCH))) as replies:
        await anext(replies)
        began_s = clock.now_s()
        await sat.listening.kill()
        with pytest.raises(PeerLost):
            async for _ in replies:
                pass
        return clock.now_s() - began_s


@pytest.mark.parametrize("kind", STOCK)
def test_the_death_of_a_server_ends_its_steps_at_once_and_its_return_is_seen(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind, cost=SLOW, config=QUICK)
        assert sat.listening is not None
        assert await killed(place, sat) < 0.5
        await until(lambda: not sat.seat.load().serving)
        assert sat.seat.load().fault
        began_s = clock.now_s()
        with pytest.raises(PeerLost):
            await place.run(sat, place.request(PROMPT, MUCH))
        assert clock.now_s() - began_s < 0.2
        sat.listening = await Listening(app_of(kind, sat.engine), sat.listening.port).start()
        await until(lambda: sat.seat.load().serving)
        short = Sampling(3, **GREEDY)
        assert (await place.run(sat, place.request(PROMPT, short))).tokens == expected(PROMPT, short)
        assert sat.seat.load().running == 0

    play(case)


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("what", ["process", "engine"])
def test_a_frozen_server_is_a_lost_one_and_its_engine_alone_too(kind: str, what: str) -> None:
    async def case(place: Place) -> None:
        silent = what == "engine" and kind == "vllm"  # nothing else tells
        config = QUICK if silent else msgspec.structs.replace(QUICK, silence_timeout_s=30.0)
        sat = await place.seat(kind, cost=SLOW, config=config)
        async with aclosing(place.stream(sat, place.request(PROMPT, MUCH))) as replies:
            await anext(replies)
            sat.engine.stalled.clear()
            if what == "process":
                sat.engine.frozen.clear()
            began_s = clock.now_s()
            with pytest.raises(TimedOut if silent else PeerLost):
                async for _ in replies:
                    pass
            assert clock.now_s() - began_s < 3.0
        if not silent:
            await until(lambda: not sat.seat.load().serving)
        sat.engine.frozen.set()
        sat.engine.stalled.set()
        await until(lambda: sat.seat.load().serving)
        await until(lambda: sat.seat.load().running == 0)

    play(case)


def test_a_server_that_takes_long_over_a_prompt_is_lost_only_when_it_gets_no_further() -> None:
    async def case(place: Place) -> None:
        config = msgspec.structs.replace(QUICK, stall_timeout_s=0.4, silence_timeout_s=30.0)
        sat = await place.seat("sglang", config=config)
        sat.engine.stalled.clear()  # no token comes
        for _ in range(20):
            sat.engine.prefill_tokens += 64
            await asyncio.sleep(0.05)
            assert sat.seat.load().serving
        await until(lambda: not sat.seat.load().serving)
        assert "does not compute" in sat.seat.load().fault

    play(case)


@pytest.mark.parametrize("kind", STOCK)
def test_a_slow_server_is_not_a_lost_one(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind, config=QUICK)
        sampling = Sampling(4, **GREEDY)
        async with aclosing(place.stream(sat, place.request(PROMPT, sampling))) as replies:
            await anext(replies)
            sat.engine.stalled.clear()
            await asyncio.sleep(0.3)  # silent, but not for too long
            sat.engine.stalled.set()
            rest = [reply async for reply in replies]
        assert len(rest) >= 2
        assert sat.seat.load().serving
        assert sat.seat.stats["adapter"].servers_lost == 0  # type: ignore[attr-defined]

    play(case)


@pytest.mark.parametrize("kind", STOCK)
def test_another_server_in_its_place_is_not_taken_for_it(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind, config=QUICK)
        assert sat.listening is not None
        await sat.listening.kill()
        await until(lambda: not sat.seat.load().serving)
        other = StockEngine()
        other.engine._info = type(other.engine.info)("other", other.engine.info.layout, 512, 16384, 256)
        sat.listening = await Listening(app_of(kind, other), sat.listening.port).start()
        await until(lambda: "serves" in sat.seat.load().fault)
        assert not sat.seat.load().serving

    play(case)


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize(
    ("fail", "error"),
    [("400", InvalidRequest), ("500", ClusterError), ("503", Overloaded), ("garbage", ProtocolError)],
)
def test_what_a_server_answers_instead_has_a_decided_meaning(kind: str, fail: str, error: type[Exception]) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind)
        sat.engine.fail = fail
        with pytest.raises(ClusterError) as raised:
            await place.run(sat, place.request(PROMPT, MUCH))
        assert type(raised.value) is error
        assert raised.value.retriable == (fail == "503")
        short = Sampling(3, **GREEDY)
        assert (await place.run(sat, place.request(PROMPT, short))).tokens == expected(PROMPT, short)
        assert sat.seat.load().running == 0

    play(case)


def test_a_request_that_its_server_aborts_is_lost() -> None:
    async def case(place: Place) -> None:
        sat = await place.seat("sglang", cost=SLOW)
        async with aclosing(place.stream(sat, place.request(PROMPT, MUCH))) as replies:
            await anext(replies)
            next(iter(sat.engine.running.values())).set()
            with pytest.raises(PeerLost, match="aborted"):
                async for _ in replies:
                    pass

    play(case)


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_without_its_prefill_worker_or_the_store_a_step_is_computed_where_it_is(kind: str) -> None:
    async def case(place: Place) -> None:
        prefill, decode = await place.seat(kind, "prefill"), await place.seat(kind)
        assert prefill.listening is not None
        sampling = Sampling(4, **GREEDY)
        await prefill.listening.kill()
        told = await place.run(decode, place.request(LONG, sampling, prefill=prefill.seat.info.node))
        assert told.tokens == expected(LONG, sampling)
        assert told.end.usage.prefill_fallback == "peer_lost"
        other = [3, *LONG]
        decode.seat.set_members(Members(2, tuple(info for info in place.infos if info.role != "store")))
        began_s = clock.now_s()
        told = await place.run(decode, place.request(other, sampling))
        assert told.tokens == expected(other, sampling)
        assert told.end.published_tokens == 0
        assert clock.now_s() - began_s < 5.0

    play(case)


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_what_shares_no_blocks_computes_each_prompt_once(kind: str) -> None:
    async def case(place: Place) -> None:
        prefill = await place.seat(kind, "prefill")
        decode = await place.seat(kind, limits=msgspec.structs.replace(LIMITS, use_store=False))
        assert decode.seat.info.limits.local_prefill_tokens == decode.seat.info.context_max, "no helper is priced"
        assert (await place.seat(kind)).seat.info.limits.local_prefill_tokens == LIMITS.local_prefill_tokens
        sampling = Sampling(4, **GREEDY)
        told = await place.run(decode, place.request(LONG, sampling, prefill=prefill.seat.info.node))
        assert told.tokens == expected(LONG, sampling)
        assert prefill.engine.asked == []

    play(case)


def test_an_answer_in_one_body_may_take_as_long_as_its_tokens() -> None:
    async def case(place: Place) -> None:
        sat = await place.seat("vllm", cost=SLOW, config=QUICK)
        sampling = Sampling(45, **GREEDY)
        began_s = clock.now_s()
        told = await place.run(sat, place.request(PROMPT, sampling, prompt_logprobs=0))
        assert clock.now_s() - began_s > QUICK.silence_timeout_s
        assert told.tokens == expected(PROMPT, sampling)

    play(case)


@pytest.mark.parametrize("kind", STOCK)
def test_a_step_goes_on_elsewhere_when_its_server_dies_in_the_middle(kind: str) -> None:
    async def case(place: Place) -> None:
        dispatch = Dispatch(Peers(place.network.at("router:9")), DispatchConfig(retry_pause_s=0.01))
        await place.network.listen("router:9", dispatch.members)
        joined: list[asyncio.Task[None]] = []
        for _ in range(2):
            sat = await place.seat(kind, cost=SLOW, config=PATIENT)
            peers = Peers(place.network.at(sat.address))
            member = Membership(peers, ["router:9"], sat.seat.info, sat.seat.load, lambda members: None)
            joined.append(asyncio.create_task(member.run()))
            await member.joined.wait()

        async def run(sampling: Sampling, name: str) -> tuple[list[int], Finished | None]:
            tokens: list[int] = []
            request = StepRequest(StepId(name), TraceId(name), None, pack_tokens(PROMPT), sampling)
            async with aclosing(dispatch.run(request)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        return tokens, event
                    tokens += event.tokens
                    busy = [sat for sat in place.sats if sat.engine.running]
                    if len(tokens) >= 5 and busy and dispatch.stats.steps_moved == moved:
                        assert busy[0].listening is not None
                        await busy[0].listening.kill()
                        port = busy[0].listening.port
                        busy[0].listening = await Listening(app_of(kind, busy[0].engine), port).start()
            return tokens, None

        for sampling, name in ((Sampling(30, **GREEDY), "greedy"), (Sampling(30, seed=5, temperature=0.9), "seeded")):
            moved = dispatch.stats.steps_moved
            if name == "seeded":
                with pytest.raises(CannotContinue):
                    await run(sampling, name)
                continue
            tokens, done = await run(sampling, name)
            assert tokens == expected(PROMPT, sampling)
            assert done is not None
            assert done.usage.output_tokens == 30
            assert dispatch.stats.steps_moved == 1
        for task in joined:
            task.cancel()
        await asyncio.gather(*joined, return_exceptions=True)
        await dispatch.close()

    play(case)
