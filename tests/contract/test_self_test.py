"""Whether a server's KV may be shared: what is asked of it at its start, over a store."""

import pytest

from engines.adapter import selftest
from engines.adapter.dialect import Cached, Figures
from engines.adapter.pace import Pace
from engines.adapter.selftest import Answer, Unequal, difference, prove, timed
from engines.adapter.server import StockServer
from engines.adapter.watch import known
from tests.seats import STOCK, Place, Sat, dialect_of, play
from tracehaul.wire.steps import TokenLogprobs

AT_ONCE_S = 0.0


async def proved(kind: str, sat: Sat, within_s: float, pace: Pace | None = None) -> bool:
    assert sat.listening is not None
    server, dialect = StockServer(sat.listening.url), dialect_of(kind)
    try:
        equal = await prove(server, dialect, await known(server, dialect, 5.0), within_s)
        if pace is not None:
            pace.look(dialect.figures(await server.get(dialect.load_path, 5.0)))
        return equal
    finally:
        await server.aclose()


@pytest.mark.parametrize("kind", STOCK)
def test_a_server_that_reads_the_store_as_it_writes_is_taken(kind: str) -> None:
    async def case(place: Place) -> None:
        sat, pace = await place.seat(kind), Pace()
        assert await proved(kind, sat, 5.0, pace)
        assert pace.rates.token_s == pytest.approx(1e-3), "its own prompts are the first that is known of its speed"
        assert len(sat.engine.asked) >= 2
        assert len({body["cache_salt"] for body in sat.engine.asked}) == (
            1 if "sglang" in kind else len(sat.engine.asked)
        )

    play(case)


@pytest.mark.parametrize("kind", STOCK)
def test_one_that_reads_it_otherwise_is_refused(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind)
        sat.engine.garbles = True
        with pytest.raises(Unequal, match=r"token \d"):
            await proved(kind, sat, 5.0)

    play(case)


@pytest.mark.parametrize("kind", STOCK)
def test_one_whose_blocks_do_not_come_back_is_known_nothing_of(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind)
        sat.engine.store = None
        assert not await proved(kind, sat, AT_ONCE_S)

    play(case)


@pytest.mark.parametrize("kind", STOCK)
def test_a_servers_speed_is_that_of_a_prompt_after_its_first(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind)
        assert sat.listening is not None
        server, dialect, pace = StockServer(sat.listening.url), dialect_of(kind), Pace()
        try:
            figures = await timed(server, dialect, await known(server, dialect, 5.0))
        finally:
            await server.aclose()
        assert figures is not None
        assert figures[1].prefill_tokens - figures[0].prefill_tokens == 328, "nothing of it was there before"
        pace.begin(*figures)
        assert pace.rates.token_s == pytest.approx(1e-3)
        assert [len(body.get("prompt") or body["input_ids"]) for body in sat.engine.asked] == [328, 328]

    play(case)


@pytest.mark.parametrize("kind", STOCK)
def test_of_a_server_that_says_nothing_new_no_speed_is_known(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def case(place: Place) -> None:
        sat = await place.seat(kind)
        assert sat.listening is not None
        server, dialect = StockServer(sat.listening.url), dialect_of(kind)
        still = Figures(prefill_tokens=5, prefill_s=1.0)
        monkeypatch.setattr(type(dialect), "figures", lambda self, answer: still)
        monkeypatch.setattr(selftest, "TOLD_S", 0.3)
        try:
            assert await timed(server, dialect, await known(server, dialect, 5.0)) is None
        finally:
            await server.aclose()

    play(case)


def said(*tokens: tuple[int, float], top: tuple[tuple[int, float], ...] = ()) -> Answer:
    return Answer([token for token, _ in tokens], [TokenLogprobs(logprob, top) for _, logprob in tokens], Cached(0))


@pytest.mark.parametrize(
    ("computed", "found", "told"),
    [
        (said((5, -0.1), (6, -0.2)), said((5, -0.15), (6, -0.1)), None),
        (said((5, -0.1), (6, -0.2)), said((5, -0.1), (6, -0.9)), "logprob of token 2 differs by 0.70"),
        (said((5, -0.1), (6, -0.2)), said((5, -0.1), (7, -0.1)), "token 2 is 7, and 6 where"),
        (said((5, -0.7), (6, -0.2), top=((5, -0.7), (8, -0.8))), said((8, -0.7), (9, -4.0)), None),
        (said((5, -0.7), (6, -0.2), top=((5, -0.7), (8, -1.8))), said((8, -0.7), (6, -0.2)), "token 1 is 8"),
    ],
)
def test_rounding_is_no_difference(computed: Answer, found: Answer, told: str | None) -> None:
    why = difference(computed, found)
    assert (why is None) if told is None else (why is not None and told in why)
