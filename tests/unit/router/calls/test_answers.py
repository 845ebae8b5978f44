"""Stop strings, stop tokens and counts of one choice."""

from hypothesis import given, settings
from hypothesis import strategies as st

from router.calls.answers import Answer, StopMatcher
from router.calls.fakes import IM_END, FakeText
from tracehaul.wire.steps import StepUsage


def answer(stops: tuple[str, ...] = (), stop_tokens: tuple[int, ...] = (IM_END,), min_tokens: int = 0) -> Answer:
    return Answer(FakeText().stream(), stops=stops, stop_tokens=stop_tokens, min_tokens=min_tokens)


def test_a_possible_beginning_is_held_back_until_it_is_none() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("hello\n") == ("hello", False)
    assert matcher.push("\nUse") == ("", False)
    assert matcher.push("ful") == ("\n\nUseful", False)
    assert matcher.push("\n\n") == ("", False)
    assert matcher.push("User: x") == ("", True)


def test_what_is_held_back_is_shown_at_the_end() -> None:
    matcher = StopMatcher(["stop"])
    assert matcher.push("a st") == ("a ", False)
    assert matcher.flush() == "st"
    assert matcher.flush() == ""


def first_match(text: str, stops: list[str]) -> str:
    """The oracle: the shortest beginning that ends with a stop string, without it."""
    for end in range(1, len(text) + 1):
        found = [end - len(s) for s in stops if text[:end].endswith(s)]
        if found:
            return text[: min(found)]
    return text


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.text("abc", max_size=5), max_size=12),
)
def test_the_cut_does_not_depend_on_the_pieces(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, stopped = "", False
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
        assert first_match("".join(pieces), stops).startswith(shown), "nothing is shown that must be taken back"
        if stopped:
            break
    if not stopped:
        shown += matcher.flush()
    assert shown == first_match("".join(pieces), stops)


def test_tokens_after_a_stop_string_do_not_count() -> None:
    one = answer(stops=("lo w",))
    piece = one.push(list(b"hello world"))
    assert (piece.said.content, one.reason, one.matched) == ("hel", "stop", True)
    assert one.tokens == list(b"hello w")
    assert one.text == "hel"


def test_half_characters_wait_for_their_rest() -> None:
    one = answer()
    smile = "🙂".encode()
    assert [one.push([byte]).said.content for byte in smile] == ["", "", "", "🙂"]
    assert one.push([smile[0]]).said.content == ""
    assert one.finish("length", StepUsage()).said.content == "\ufffd"
    assert (one.text, one.reason) == ("🙂\ufffd", "length")


def test_a_stop_token_counts_and_is_not_shown() -> None:
    one = answer()
    assert one.push([104, 105, IM_END]).said.content == "hi"
    assert one.finish("stop", StepUsage()).said.content == ""
    assert (len(one.tokens), one.generated) == (3, [104, 105])
    visible = answer(stop_tokens=(105,))
    assert visible.push([104, 105]).said.content == "h"


def test_an_ignored_end_token_is_part_of_what_was_generated() -> None:
    one = answer(stop_tokens=())
    one.push([104, IM_END, 105])
    assert (one.text, one.generated) == ("hi", [104, IM_END, 105])


def test_stop_strings_wait_for_the_minimum() -> None:
    one = answer(stops=("ab",), min_tokens=3)
    assert one.push(list(b"abc")).said.content == "abc"
    assert one.push(list(b"xaby")).said.content == "x"
    assert one.matched


def test_a_stop_string_completed_by_the_last_bytes_is_a_stop() -> None:
    one = answer(stops=("x\ufffd",))
    assert one.push([120, 0xC3]).said.content == ""
    assert one.finish("length", StepUsage()).said.content == ""
    assert (one.reason, one.matched) == ("stop", True)


@given(st.lists(st.sampled_from([*b"ab\n", *"é😀".encode(), IM_END, 258, 261]), max_size=30), st.integers(0, 9))
def test_tokens_at_once_say_what_they_say_one_by_one(tokens: list[int], min_tokens: int) -> None:
    """With a stop string that never comes, too: then they are looked at one by one."""
    at_once, one_by_one, looked_at = answer(min_tokens=min_tokens), answer(), answer(("never",), min_tokens=min_tokens)
    at_once.push(tokens)
    looked_at.push(tokens)
    for token in tokens:
        one_by_one.push([token])
    for one in (at_once, one_by_one, looked_at):
        one.finish("length", StepUsage())
    assert at_once.text == one_by_one.text == looked_at.text
    assert at_once.generated == one_by_one.generated == looked_at.generated
    assert at_once.tokens == tokens
