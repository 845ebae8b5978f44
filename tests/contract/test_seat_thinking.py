"""Answers that a model reasons before, and that are held to a grammar from there on, over servers that know neither."""

from collections.abc import Sequence

import pytest

from engines.adapter.thinking import Marks
from tests.seats import INFO, STOCK, Place, Sat, Told, play
from tracehaul.engine.fake import expected_output
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.steps import Constraint, Sampling

END = INFO.vocab_size - 1
PROMPT = list(range(1, 22))
GREEDY = {"temperature": 0.0}
FREE = expected_output(PROMPT, Sampling(12, temperature=0.0), INFO.vocab_size)
"""What the model says by itself."""


def sampling(thinking: str, count: int = 20, **more: object) -> Sampling:
    constraint = Constraint("regex", "ab{3}c", thinking=thinking)  # type: ignore[arg-type]
    return Sampling(count, constraint=constraint, stop_tokens=(END,), **{**GREEDY, **more})  # type: ignore[arg-type]


async def seated(place: Place, kind: str, marks: Marks) -> Sat:
    sat = await place.seat(kind)
    sat.seat.books.marks = marks  # type: ignore[attr-defined]
    return sat


def text(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode()


def one_by_one(told: Told) -> None:
    assert told.end.usage.output_tokens == len(told.tokens)


@pytest.mark.parametrize("kind", STOCK)
@pytest.mark.parametrize("thinking", ["opened", "may"])
def test_the_grammar_begins_where_the_reasoning_ends(kind: str, thinking: str) -> None:
    async def case(place: Place) -> None:
        sat = await seated(place, kind, Marks(FREE[0], FREE[4]))
        told = await place.run(sat, place.request(PROMPT, sampling(thinking)))
        thoughts = FREE[: FREE.index(FREE[4]) + 1]
        assert told.tokens[: len(thoughts)] == thoughts
        assert text(told.tokens[len(thoughts) : -1]) == "abbbc"
        assert (told.tokens[-1], told.end.reason) == (END, "stop")
        one_by_one(told)
        assert told.end.usage.computed_from == 0, "what it had computed itself is no hit"
        assert not sat.engine.running, "nothing goes on there"

    play(case)


@pytest.mark.parametrize("kind", STOCK)
def test_a_model_that_does_not_reason_is_held_from_its_first_token(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await seated(place, kind, Marks(END - 1, END - 2))
        told = await place.run(sat, place.request(PROMPT, sampling("may")))
        assert text(told.tokens[:-1]) == "abbbc"
        one_by_one(told)

    play(case)


@pytest.mark.parametrize("kind", STOCK)
def test_reasoning_that_does_not_end_ends_with_the_answer(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await seated(place, kind, Marks(FREE[0], END - 2))
        told = await place.run(sat, place.request(PROMPT, sampling("opened", 7)))
        assert (told.tokens, told.end.reason) == (FREE[:7], "length")

    play(case)


@pytest.mark.parametrize("kind", STOCK)
def test_what_cannot_be_kept_to_is_refused(kind: str) -> None:
    async def case(place: Place) -> None:
        sat = await seated(place, kind, Marks(None, FREE[4]))
        with pytest.raises(InvalidRequest, match="no token that ends it"):
            await place.run(sat, place.request(PROMPT, sampling("may")))
        with pytest.raises(InvalidRequest, match="penalties"):
            await place.run(sat, place.request(PROMPT, sampling("opened", presence_penalty=1.0)))
        sat.seat.books.marks = Marks()  # type: ignore[attr-defined]
        with pytest.raises(InvalidRequest, match="no token that ends it"):
            await place.run(sat, place.request(PROMPT, sampling("opened")))
        assert sat.engine.asked == []

    play(case)
