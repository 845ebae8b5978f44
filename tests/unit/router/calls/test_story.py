"""Answers that say the same, however they are spelled."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.calls.call import Message, ToolCall
from router.calls.events import Said, SaidCall
from router.calls.story import ANSWER, answered, canonical, says, sent, untold

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), st.booleans(), st.sampled_from([None, 1, 4]))
def test_one_spelling_for_all(value: dict[str, object], ascii_only: bool, indent: int | None) -> None:
    shuffled = dict(reversed(list(value.items())))
    spelled = json.dumps(shuffled, ensure_ascii=ascii_only, indent=indent)
    assert canonical(spelled) == canonical(json.dumps(value))
    assert json.loads(canonical(spelled)) == value


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('{"a":1.0}', '{"a": 1}', True),
        ('{"a":1e3}', '{"a":1000}', True),
        ('{"a":"é"}', '{"a":"\\u00e9"}', True),
        ("", "{}", True),
        ("  ", "{}", True),
        ('{"a":1}', '{"a":2}', False),
        ('{"a":1}', '{"a":"1"}', False),
        ('{"a": "tru', '{"a": "tru', True),
        ('{"a": "tru', '{"a": "true"}', False),
        ("[" * 100_000, "[", False),
    ],
)
def test_equal_as_json(one: str, other: str, same: bool) -> None:
    assert (canonical(one) == canonical(other)) is same


def test_an_answer_comes_back_as_it_was_told() -> None:
    told = answered(Said("thought", "text", (SaidCall(0, "id", "f", '{"a": 1}'),)))
    back = Message("assistant", "text", None, None, (ToolCall("other id", "f", '{"a": 1}'),))
    assert sent(told) == sent(back)
    spelled = Message("assistant", " text\n", None, "thought", (ToolCall("id", "f", '{"a":1.0}'),))
    assert sent(told) != sent(spelled)
    assert says(told) == says(spelled)
    for other in (
        Message("assistant", "text"),
        Message("assistant", "text", tool_calls=(ToolCall("id", "g", '{"a":1}'),)),
        Message("assistant", "texts", tool_calls=(ToolCall("id", "f", '{"a":1}'),)),
    ):
        assert says(other) != says(told)


def test_what_takes_an_answers_place_has_its_shape() -> None:
    calls = [{"id": str(at), "type": "function", "function": {"name": "f", "arguments": {}}} for at in range(2)]
    message = {"role": "assistant", "content": "x", "reasoning_content": "y", "tool_calls": calls}
    marked = untold(message)
    assert (marked["content"], len(marked["tool_calls"]), "reasoning_content" in marked) == (ANSWER, 1, False)
    assert marked["tool_calls"][0]["function"] == {"name": "f", "arguments": {ANSWER: ANSWER}}
    assert "tool_calls" not in untold({"role": "assistant", "content": "x"})


def test_half_a_surrogate_pair_in_arguments_is_a_value_like_others() -> None:
    one, other = (ToolCall("1", "f", text) for text in ('{"a":"\\ud83d"}', '{ "a": "\\uD83D" }'))
    assert says(Message("assistant", tool_calls=(one,))) == says(Message("assistant", tool_calls=(other,)))
