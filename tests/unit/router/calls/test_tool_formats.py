"""Calls in models' text: what is told does not depend on how the text is cut, and nothing is lost."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.calls.reasoning import ThinkReader
from router.calls.tool_formats import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Event,
    ToolFormat,
    ToolReader,
)

NAMES = frozenset({"look_up", "add"})
HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "}\\"{"}}\n</tool_call>'
LLAMA = '{"name": "add", "parameters": {"a": [1, {"b": 2}]}}'


def read(
    form: ToolFormat, pieces: list[str], *, forced: bool = False, ids: bool = False
) -> tuple[str, list[tuple[str, str]]]:
    reader = ToolReader(form, NAMES if form == "llama3" else None, forced=forced, ids=ids)
    events: list[Event] = []
    for piece in pieces:
        events += reader.feed(piece)
    return told([*events, *reader.finish()])


def told(events: list[Event]) -> tuple[str, list[tuple[str, str]]]:
    """All content, and each call's name and arguments; asserts what a client relies on."""
    content, calls = "", dict[int, tuple[str, str]]()
    opened = -1
    for event in events:
        match event:
            case Content(text):
                assert text
                content += text
            case CallStart(index, name, _):
                assert index == opened + 1
                opened, calls[index] = index, (name, "")
            case CallArguments(index, text):
                assert index == opened
                assert text
                calls[index] = (calls[index][0], calls[index][1] + text)
            case CallEnd(index):
                assert index == opened
                assert isinstance(json.loads(calls[index][1]), dict)
            case CallBroken(index):
                assert index == opened
                del calls[index]
    return content, list(calls.values())


CASES: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    ("hermes", "just text", "just text", []),
    ("hermes", HERMES, "", [("add", '{"a": 1, "b": "}\\"{"}')]),
    ("hermes", f"Let me see.\n\n{HERMES}\n", "Let me see.", [("add", '{"a": 1, "b": "}\\"{"}')]),
    ("hermes", f"{HERMES}\n{HERMES}", "", [("add", '{"a": 1, "b": "}\\"{"}')] * 2),
    ("hermes", f"{HERMES} and so on", " and so on", [("add", '{"a": 1, "b": "}\\"{"}')]),
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "add"}</tool_call>', "", [("add", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>[{"name": "add", "arguments": {}}, {"name": "b", "arguments": {}}]</tool_call>', "",
     [("add", "{}"), ("b", "{}")]),
    ("hermes", 'see <tool_call>{"na', 'see <tool_call>{"na', []),
    ("hermes", "a < b and <tool", "a < b and <tool", []),
    ("hermes", "<tool_call> nothing </tool_call>", "<tool_call> nothing </tool_call>", []),
    ("hermes", f"<tool_call>{HERMES}", "<tool_call>", [("add", '{"a": 1, "b": "}\\"{"}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": [1', "", [("add", '{"a": [1')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {}} </tool_', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
     '<tool_call>{"name": 5, "arguments": {}}</tool_call>', []),
    ("hermes", "trailing space \n", "trailing space \n", []),
    # Slips are mended.
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "x\ny", "b": True,}}</tool_call>', "",
     [("add", '{"a": "x\\ny", "b": true}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": \\"C:\\dir\\"}"}</tool_call>', "",
     [("add", '{"a": "C:\\\\dir"}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}}}\n</tool_call>', "", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}\n</tool_call>', "", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": ""}</tool_call>', "", [("add", "{}")]),
    # What cannot be mended is content.
    ("hermes", 'so <tool_call>{"name": "add", "arguments": [1]}</tool_call>',
     'so <tool_call>{"name": "add", "arguments": [1]}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": b}}</tool_call> x',
     '<tool_call>{"name": "add", "arguments": {"a": b}}</tool_call> x', []),
    ("hermes", f'<tool_call>{{"name": "add", "arguments": 5}}</tool_call>{HERMES}',
     '<tool_call>{"name": "add", "arguments": 5}</tool_call>', [("add", '{"a": 1, "b": "}\\"{"}')]),
    ("mistral", "[TOOL_CALLS]add{'a': 1}", "[TOOL_CALLS]add{'a': 1}", []),
    ("mistral", '[TOOL_CALLS]add{"a": "x\ty",}', "", [("add", '{"a": "x\\ty"}')]),
    ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "c", "arguments": {}}]', "",
     [("add", '{"a": 1}'), ("c", "{}")]),
    ("mistral", '[TOOL_CALLS]add{"a": {"b": 1}}[TOOL_CALLS]look_up[ARGS]{}', "",
     [("add", '{"a": {"b": 1}}'), ("look_up", "{}")]),
    ("mistral", 'Sure.[TOOL_CALLS]add[CALL_ID]a1b2c3d4e[ARGS]{"a": 1}', "Sure.", [("add", '{"a": 1}')]),
    ("mistral", "[TOOL_CALLS] no calls here", "[TOOL_CALLS] no calls here", []),
    ("mistral", "[TOOL_CALLS] two words {}", "[TOOL_CALLS] two words {}", []),
    ("llama3", LLAMA, "", [("add", '{"a": [1, {"b": 2}]}')]),
    ("llama3", f"<|python_tag|>{LLAMA}; {LLAMA}", "", [("add", '{"a": [1, {"b": 2}]}')] * 2),
    ("llama3", '{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
    ("llama3", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3", f"I say: {LLAMA}", f"I say: {LLAMA}", []),
    # Where nothing marks calls, all of one is there or none of it.
    ("llama3", '{"name": "add", "parameters": {"a"', '{"name": "add", "parameters": {"a"', []),
    ("llama3", '{"name": "add", "parameters": {}, "x": 1}', '{"name": "add", "parameters": {}, "x": 1}', []),
    ("llama3", '{"name": "add", "parameters": {"a": b}}', '{"name": "add", "parameters": {"a": b}}', []),
    ("llama3", f'{LLAMA}; {{"name": "look_up", "parameters": {{}}}}', "",
     [("add", '{"a": [1, {"b": 2}]}'), ("look_up", "{}")]),
    ("llama3", f'{LLAMA}; {{"name": "look_up"', '; {"name": "look_up"', [("add", '{"a": [1, {"b": 2}]}')]),
    ("llama3", "", "", []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_what_is_a_call_and_what_is_not(
    form: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert read(form, [text]) == (content, calls)
    assert read(form, list(text)) == (content, calls)
    for at in range(len(text)):
        assert read(form, [text[:at], text[at:]]) == (content, calls)


FORCED: list[tuple[ToolFormat, str, list[tuple[str, str]]]] = [
    ("hermes", "<tool_c", []),
    ("hermes", '<tool_call>\n{"na', []),
    ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": "x', [("add", '{"a": "x')]),
    ("hermes", f"{HERMES}\n<", [("add", '{"a": 1, "b": "}\\"{"}')]),
    ("hermes", f"{HERMES}\n<tool_call>", [("add", '{"a": 1, "b": "}\\"{"}')]),
    ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"na', [("add", '{"a": 1}')]),
    ("llama3", '{"name": "add", "parameters": {"a": 1', [("add", '{"a": 1')]),
    ("llama3", f"{LLAMA}; ", [("add", '{"a": [1, {"b": 2}]}')]),
    ("llama3", '{"name', []),
]


@pytest.mark.parametrize(("form", "text", "calls"), FORCED)
def test_no_markup_of_a_forced_call_is_content(form: ToolFormat, text: str, calls: list[tuple[str, str]]) -> None:
    for pieces in ([text], list(text), *([text[:at], text[at:]] for at in range(len(text)))):
        assert read(form, pieces, forced=True) == ("", calls)


def ids(pieces: list[str], form: ToolFormat = "mistral", *, late: bool = True) -> list[str]:
    reader = ToolReader(form, NAMES if form == "llama3" else None, ids=late)
    events = [event for piece in pieces for event in reader.feed(piece)] + reader.finish()
    told(events)
    return [event.id for event in events if isinstance(event, CallStart)]


LISTED = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "abc123DEF"}, {"name": "c", "arguments": {}}]'


@pytest.mark.parametrize(
    ("form", "text", "found"),
    [
        ("mistral", LISTED, ["abc123DEF", ""]),
        ("mistral", '[TOOL_CALLS] [{"id": "abc123DEF", "name": "add", "arguments": {}}]', ["abc123DEF"]),
        ("mistral", '[TOOL_CALLS]add[CALL_ID]a1b2c3d4e[ARGS]{"a": 1}[TOOL_CALLS]c[ARGS]{}', ["a1b2c3d4e", ""]),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": 5}]', [""]),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": "abc', [""]),
        ("hermes", '<tool_call>{"id": "call_1", "name": "add", "arguments": {}}</tool_call>', ["call_1"]),
        ("llama3", '{"name": "add", "parameters": {}, "id": "x"}', ["x"]),
    ],
)
def test_ids_that_a_model_gives_are_told_with_its_calls(form: ToolFormat, text: str, found: list[str]) -> None:
    for pieces in ([text], list(text), *([text[:at], text[at:]] for at in range(len(text)))):
        assert ids(pieces, form) == found


def test_an_id_that_comes_last_is_waited_for_where_there_may_be_one() -> None:
    assert ids(list(LISTED), late=False) == ["", ""]
    reader = ToolReader("mistral", None, ids=True)
    assert reader.feed('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}') == []
    assert reader.feed(', "id": "abc123DEF"')[0] == CallStart(0, "add", "abc123DEF")
    early = ToolReader("mistral", None, ids=True)
    assert early.feed('[TOOL_CALLS]add[CALL_ID]a1b2c3d4e[ARGS]{"a"')[0] == CallStart(0, "add", "a1b2c3d4e")


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_who_waits_for_ids_reads_the_same(
    form: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    if form == "mistral":
        for pieces in ([text], list(text), *([text[:at], text[at:]] for at in range(len(text)))):
            assert read(form, pieces, ids=True) == (content, calls)


ALPHABET = st.sampled_from(
    [*'{}[]":,;\\ \n<>/x1', "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>",
     '"name"', '"id"', '"abc123DEF"', '"add"', '"arguments"', '"parameters"', "add", "null",
     '{"name": "add", "arguments": {"a": 1}}',
     '{"name": "add", "arguments": {"a": "', '{"name": "add", "parameters": {', ',"b":', "True,}"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["hermes", "mistral", "llama3"]), st.lists(ALPHABET, max_size=30), st.data())
def test_cuts_change_nothing(form: ToolFormat, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    pieces: list[str] = []
    while text:
        size = data.draw(st.integers(1, len(text)))
        pieces.append(text[:size])
        text = text[size:]
    whole = "".join(pieces)
    assert read(form, pieces) == read(form, [whole]) == read(form, list(whole))
    content, calls = read(form, [whole])
    assert read(form, pieces, ids=True) == read(form, [whole], ids=True) == (content, calls)
    if not calls:
        assert content == whole


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["hermes", "mistral", "llama3"]),
    st.text(alphabet="abc .\n", max_size=12),
    st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), min_size=1, max_size=3),
    st.booleans(),
    st.integers(1, 7),
)
def test_calls_come_out_as_they_went_in(
    form: ToolFormat, said: str, arguments: list[dict[str, object]], ascii_only: bool, size: int
) -> None:
    key = "parameters" if form == "llama3" else "arguments"
    calls = [json.dumps({"name": "add", key: each}, ensure_ascii=ascii_only) for each in arguments]
    match form:
        case "hermes":
            text = said + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
        case "mistral":
            text = said + f"[TOOL_CALLS] [{', '.join(calls)}]"
        case "llama3":
            said = ""
            text = "; ".join(calls)
    content, found = read(form, [text[at : at + size] for at in range(0, len(text), size)])
    assert content == said.rstrip()
    assert [name for name, _ in found] == ["add"] * len(arguments)
    assert [json.loads(each) for _, each in found] == arguments


def think(pieces: list[str], *, opened: bool = False) -> tuple[str, str]:
    reader = ThinkReader(opened=opened)
    thoughts = [*(reader.feed(piece) for piece in pieces), reader.finish()]
    return "".join(t.reasoning for t in thoughts), "".join(t.text for t in thoughts)


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("no thoughts", False, "", "no thoughts"),
        ("<think>\nhm\n\nyes\n</think>\n\nThe answer", False, "hm\n\nyes", "The answer"),
        ("\n<think>\n\n</think>\n\nThe answer", False, "", "The answer"),
        ("hm\n</think>\n\nThe <think> answer", True, "hm", "The <think> answer"),
        ("\nhm </thi nk", True, "hm </thi nk", ""),
        ("hm </thi", True, "hm </thi", ""),
        ("<thi", False, "", "<thi"),
        ("  <b>", False, "", "  <b>"),
        ("x <think>y</think>", False, "", "x <think>y</think>"),
        ("<think>a</think>b</think>", False, "a", "b</think>"),
        ("<think>only\n", False, "only\n", ""),
        ("", True, "", ""),
    ],
)
def test_reasoning_comes_out(text: str, opened: bool, reasoning: str, content: str) -> None:
    assert think([text], opened=opened) == (reasoning, content)
    assert think(list(text), opened=opened) == (reasoning, content)
    for at in range(len(text)):
        assert think([text[:at], text[at:]], opened=opened) == (reasoning, content)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "<", "x", "</th"]), max_size=12), st.booleans())
def test_cuts_change_no_reasoning(parts: list[str], opened: bool) -> None:
    text = "".join(parts)
    assert think(parts, opened=opened) == think([text], opened=opened) == think(list(text), opened=opened)
