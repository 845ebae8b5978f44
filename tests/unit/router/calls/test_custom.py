"""Custom tools: their text comes out of the arguments that models write, in whatever pieces."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.calls.custom import InputReader, arguments_of, input_of


def read(pieces: list[str]) -> str:
    reader = InputReader()
    return "".join([*(reader.feed(piece) for piece in pieces), reader.finish()])


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20), st.booleans(), st.integers(1, 5))
def test_a_text_comes_back_in_whatever_pieces(text: str, ascii_only: bool, size: int) -> None:
    assert input_of(arguments_of(text)) == text
    arguments = json.dumps({"input": text}, ensure_ascii=ascii_only)
    assert read([arguments[at : at + size] for at in range(0, len(arguments), size)]) == text


@pytest.mark.parametrize("arguments", ['{"patch": "x"}', '{"input": 5}', "{}", '{"a": 1, "input": "x"}'])
def test_arguments_of_another_shape_are_told_as_they_are(arguments: str) -> None:
    assert read(list(arguments)) == arguments


def test_a_text_is_told_as_it_comes() -> None:
    reader = InputReader()
    assert [reader.feed(piece) for piece in ('{"inp', 'ut": "ab', "c\\", "n\\u00", 'e9d"', "}")] == [
        "", "ab", "c", "\n", "éd", "",
    ]  # fmt: skip
    assert reader.finish() == ""
