"""What every decode seat remembers of steps whose router is lost, and who gets it."""

import asyncio
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from tests.contract.test_seat import GREEDY, PROMPT, SLOW, expected
from tests.seats import KINDS, ROOT, Place, Sat, Told, play, until
from tracehaul.rpc.peers import Peers
from tracehaul.wire.answers import answer_name
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.messages import Request
from tracehaul.wire.steps import DecodeStep, Sampling

MUCH = Sampling(24, **GREEDY)


def counted(sat: Sat, name: str) -> int:
    return sum(getattr(stats, name, 0) for stats in sat.seat.stats.values())


class Router:
    """One that can be lost."""

    def __init__(self, place: Place, name: str) -> None:
        self.peers = Peers(place.network.at(name))

    async def asks(self, sat: Sat, request: Request, tokens: int = 0) -> Told:
        """All that it is told of a step; or as soon as it has so many tokens, before it is over."""
        told = Told()
        async with aclosing(self.peers.stream(sat.address, request, idle_timeout_s=5.0)) as replies:
            async for reply in replies:
                told.take(reply)
                if tokens and len(told.tokens) >= tokens:
                    await self.peers.close()
                    break
        return told


async def lost(place: Place, sat: Sat, request: DecodeStep, tokens: int) -> Told:
    """A router is told so many of its tokens, and dies. Returns once that is known."""
    told = await Router(place, "router:1").asks(sat, request, tokens)
    await until(lambda: bool(sat.seat.load().orphans))
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_said_is_told_to_the_next_router_and_not_sampled_again(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind, cost=SLOW)
        request = place.request(PROMPT, MUCH)
        before = await lost(place, sat, request, 5)
        assert sat.seat.load().orphans == (answer_name(ROOT, request.prompt, MUCH),)
        assert sat.seat.load().running == 0, "it does not go on for nobody"
        said = counted(sat, "output_tokens")
        assert len(before.tokens) <= said < 24
        after = await Router(place, "router:2").asks(sat, place.request(PROMPT, MUCH, before.tokens[:2]))
        assert before.tokens[:2] + after.tokens == expected(PROMPT, MUCH)
        assert (after.end.reason, after.end.usage.output_tokens) == ("length", 24)
        assert counted(sat, "output_tokens") == 24
        assert counted(sat, "tokens_again") == said - 2
        assert after.usages[0].computed_from == 0, "what the first one computed was not cached"

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_was_over_is_told_again_whole_and_to_one_router_after_the_other(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind)
        first = await Router(place, "router:1").asks(sat, place.request(PROMPT, MUCH), 24)
        await until(lambda: bool(sat.seat.load().orphans))
        for name in ("router:2", "router:3"):
            router = Router(place, name)
            again = await router.asks(sat, place.request(PROMPT, MUCH))
            assert again.tokens == first.tokens
            assert (again.end.reason, again.end.usage.prompt_tokens) == ("length", 21)
            assert not sat.seat.load().orphans, "its router lives"
            await router.peers.close()
            await until(lambda: bool(sat.seat.load().orphans))
        assert counted(sat, "output_tokens") == 24

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_gets_what_was_said_to_a_router_that_lives(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind)
        router = Router(place, "router:1")
        for _ in range(2):
            await router.asks(sat, place.request(PROMPT, MUCH))
        await Router(place, "router:2").asks(sat, place.request(PROMPT, MUCH))
        assert counted(sat, "output_tokens") == 3 * 24
        assert not sat.seat.load().orphans

    play(case)


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("sampling", {"sampling": Sampling(23, **GREEDY)}),
    ("seed", {"sampling": Sampling(24, temperature=0.0, seed=1)}),
    ("prompt", {"prompt": pack_tokens([*PROMPT, 1])}),
    ("tenant", {"salt": "other"}),
    ("what it has", {"emitted": pack_tokens([1, 2])}),
    ("logprobs", {"sampling": Sampling(24, temperature=0.0, logprobs=1)}),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("what", "more"), OTHERS, ids=[what for what, _ in OTHERS])
def test_another_step_gets_nothing_of_it(kind: str, what: str, more: dict[str, Any]) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind, cost=SLOW)
        await lost(place, sat, place.request(PROMPT, MUCH), 3)
        request = msgspec.structs.replace(place.request(PROMPT, MUCH), **more)
        await Router(place, "router:2").asks(sat, request)
        assert counted(sat, "tokens_again") == 0, what

    play(case)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_cannot_go_on_begins_anew(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind, cost=SLOW)
        penalized = Sampling(24, frequency_penalty=1.5, **GREEDY)
        await lost(place, sat, place.request(PROMPT, penalized), 3)
        after = await Router(place, "router:2").asks(sat, place.request(PROMPT, penalized))
        assert after.tokens == expected(PROMPT, penalized)
        assert (counted(sat, "tokens_again") > 0) == (kind == "native")

    play(case)


def test_who_comes_while_a_lost_routers_step_is_closed_waits_for_what_it_said() -> None:
    async def case(place: Place) -> None:
        sat = await place.seat("native", cost=SLOW)
        told = await Router(place, "router:1").asks(sat, place.request(PROMPT, MUCH), 5)
        after = await Router(place, "router:2").asks(sat, place.request(PROMPT, MUCH))
        assert after.tokens[:5] == told.tokens[:5]
        assert counted(sat, "output_tokens") == 24

    play(case)


def test_news_are_told_at_once() -> None:
    async def case(place: Place) -> None:
        sat = await place.seat("native", cost=SLOW)
        waiting = asyncio.create_task(sat.seat.news())
        await Router(place, "router:1").asks(sat, place.request(PROMPT, MUCH), 3)
        await asyncio.wait_for(waiting, 1.0)

    play(case)
