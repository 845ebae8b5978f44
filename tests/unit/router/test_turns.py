"""What of a conversation is known again, and up to where."""

from router.traces.texts import Said, Text, fresh, remember
from router.traces.turns import Story, Turn, difference, known, packed_turns, with_turn

CONTEXT = b"c" * 8


def key(name: str) -> bytes:
    return name.encode().ljust(8, b".")


def text(*turns: Turn, context: bytes = CONTEXT, model: str = "m") -> Text:
    [made] = remember((), Said(fresh("x" * 99, [1]), "", b"", packed_turns(context, turns), model))
    return made


def story(*sent: str, says: dict[int, str] | None = None, context: bytes = CONTEXT) -> Story:
    return Story(context, [key(name) for name in sent], lambda at: key((says or {})[at]))


ASKED, ANSWERED = Turn(key("ask")), Turn(key("told"), key("meaning"), 40)


def test_a_beginning_is_known_up_to_its_last_answer() -> None:
    whole = text(ASKED, ANSWERED, Turn(key("more")), Turn(key("last"), key("end"), 80))
    found = known([whole], "m", story("ask", "told", "more", "last", "new"))
    assert found is not None
    assert (len(found.turns), found.end) == (4, 80)
    found = known([whole], "m", story("ask", "told", "other", says={2: "?"}))
    assert found is not None
    assert (len(found.turns), found.end, found.text) == (2, 40, whole)
    assert known([whole], "m", story("other", "told")) is None
    assert known([whole], "m", story("ask")) is None


def test_an_answer_is_known_by_what_it_says() -> None:
    one = text(ASKED, ANSWERED)
    assert known([one], "m", story("ask", "spelled otherwise", says={1: "meaning"})) is not None
    assert known([one], "m", story("ask", "spelled otherwise", says={1: "another"})) is None


def test_only_answers_are_known_so() -> None:
    one = text(Turn(key("ask")), ANSWERED)
    assert known([one], "m", story("asked otherwise", "told", says={0: "." * 8})) is None


def test_what_stands_before_and_the_model_must_be_the_same() -> None:
    one = text(ASKED, ANSWERED)
    assert known([one], "other", story("ask", "told")) is None
    assert known([one], "m", story("ask", "told", context=b"d" * 8)) is None


def test_the_longest_counts_and_of_equals_the_first() -> None:
    short, long = text(ASKED, ANSWERED), text(ASKED, ANSWERED, Turn(key("b")), Turn(key("c"), key("c"), 90))
    found = known([short, long, text(ASKED, ANSWERED)], "m", story("ask", "told", "b", "c"))
    assert found is not None
    assert found.text is long
    found = known([short, long], "m", story("ask", "told"))
    assert found is not None
    assert found.text is short


def test_where_a_conversation_differs() -> None:
    one = text(ASKED, ANSWERED, Turn(key("b")))
    assert difference([one], "m", story("ask", "told", "b", "c")) is None
    assert difference([one], "m", story("ask", "told", "x", "c")) == (one, 2)
    assert difference([one], "m", story("ask", "x", says={1: "?"})) == (one, 1)
    assert difference([one], "m", story("ask", context=b"d" * 8)) == (one, -1)
    assert difference([one], "m", story("ask", "told")) is None, "nothing of it differs"
    assert difference([text(Turn(key("z"))), one], "m", story("ask", "told", "x")) == (one, 2), "the nearest counts"
    assert difference([], "m", story("ask")) is None


def test_an_answer_is_added() -> None:
    assert with_turn(packed_turns(CONTEXT, [ASKED]), ANSWERED) == packed_turns(CONTEXT, [ASKED, ANSWERED])
