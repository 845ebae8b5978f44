"""Arguments as models write them: what is told is JSON, however it is cut, and valid JSON is told to the letter."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.calls.slips import Broken, ObjectMender, whole_object


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "{}"),
        ('{"a" : [1, -2.5e+3,true] ,\n "b":{"c":null}}', '{"a" : [1, -2.5e+3,true] ,\n "b":{"c":null}}'),
        ('{"a": "line\nnext\ttab\x01"}', '{"a": "line\\nnext\\ttab\\u0001"}'),
        ('{"a": 1,}', '{"a": 1}'),
        ('{"a": [1, 2, ], }', '{"a": [1, 2 ] }'),
        ('{"a": True, "b": [False, None], "c": TRUE}', '{"a": true, "b": [false, null], "c": true}'),
        ('{"a": "C:\\dir\\users"}', '{"a": "C:\\\\dir\\\\users"}'),
        ('{"a": "C:\\temp"}', '{"a": "C:\\temp"}'),
        ('{"a": "\\u00e9\\ud83d\\ude00"}', '{"a": "\\u00e9\\ud83d\\ude00"}'),
        ('{"a": "\\ud83d!\\ude00\\ud83d\\n\\ud83d\\ud83d\\ude00\\ud83d"}',
         '{"a": "\\ufffd!\\ufffd\\ufffd\\n\\ufffd\\ud83d\\ude00\\ufffd"}'),
        ('{"a": "it\\\'s"}', '{"a": "it\'s"}'),
        ('{"a": "cmd \\\n next"}', '{"a": "cmd \\\\\\n next"}'),
    ],
)  # fmt: skip
def test_slips_are_mended(text: str, told: str) -> None:
    assert whole_object(text) == told
    assert isinstance(json.loads(told), dict)
    for at in range(len(text)):
        mender = ObjectMender()
        mender.read(text[:at])
        first = mender.told()
        mender.read(text[at:])
        assert first + mender.told() == told


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "1",
        '"a"',
        "{a: 1}",
        "{'a': 1}",
        '{"a" 1}',
        '{"a": 1 "b": 2}',
        '{"a": 1,, "b": 2}',
        "{,}",
        '{"a": ,}',
        '{"a": [,1]}',
        '{"a": 01}',
        '{"a": NaN}',
        '{"a": tru}',
        '{"a": 1]',
        '{"a": [1}}',
        '{"a": "b"c"}',
        '{"a": 1} x',
        '{"a": 1',
        '{1: "a"}',
        '{"a": 1: 2}',
        '{"a", 1}',
    ],
)
def test_what_means_nothing_sure_is_none(text: str) -> None:
    assert whole_object(text) is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=4)


def pieces(data: st.DataObject, text: str) -> list[str]:
    found: list[str] = []
    while text:
        size = data.draw(st.integers(1, len(text)))
        found.append(text[:size])
        text = text[size:]
    return found


@settings(max_examples=200, deadline=None)
@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]), st.data())
def test_valid_objects_are_told_to_the_letter(
    value: dict[str, object], ascii_only: bool, indent: int | None, data: st.DataObject
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    mender, told = ObjectMender(), ""
    for piece in pieces(data, text):
        assert mender.read(piece) == len(piece)
        told += mender.told()
        assert text.startswith(told)
    assert mender.done
    assert told == text


@settings(max_examples=200, deadline=None)
@given(OBJECTS)
def test_slips_change_no_value(value: dict[str, object]) -> None:
    text = json.dumps(value, ensure_ascii=False)
    assert json.loads(whole_object(text) or "") == value
    raw = text.replace("\\n", "\n").replace("\\t", "\t") if "\\\\" not in text else text
    assert json.loads(whole_object(raw) or "") == value
    if value:
        assert json.loads(whole_object(text[:-1] + ",}") or "") == value


PARTS = st.sampled_from([*'{}[]":,\\ \nu1da', '{"', '":', '",', "True", "null", "\\u", "\\ud83d", "\\ude00", "\x07"])


@settings(max_examples=500, deadline=None)
@given(st.lists(PARTS, max_size=30), st.data())
def test_what_is_told_is_json_whatever_is_read_and_however_it_is_cut(parts: list[str], data: st.DataObject) -> None:
    text = '{"' + "".join(parts)

    def read(cut: list[str]) -> tuple[str, bool, int | None]:
        mender, told, before = ObjectMender(), "", 0
        for piece in cut:
            try:
                end = mender.read(piece)
            except Broken as broken:
                return told, False, before + broken.at
            told += mender.told()
            before += end
            if mender.done:
                assert isinstance(json.loads(told), dict)
                return told, True, before
        return told, False, None

    whole, cut = read(list(text)), read(pieces(data, text))
    assert whole[1:] == cut[1:]
    # What was told before it broke depends on the cuts: one is the beginning of the other.
    assert whole[0] == cut[0] if whole[2] is None or whole[1] else whole[0].startswith(cut[0])
