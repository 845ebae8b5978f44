"""The memory of traces' texts: which ids are kept, and that cutting never changes the others."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from router.calls.fakes import IM_END, FakeText
from router.traces.texts import TEXTS_MAX, CutTokens, Encoded, Said, Text, extend, find, fresh, remember
from tracehaul.wire.hashing import pack_tokens

CUTS = CutTokens({"<|im_end|>": IM_END})
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"


class Memory:
    """The texts of some traces."""

    def __init__(self, cuts: CutTokens = CUTS) -> None:
        self._cuts = cuts
        self.texts: dict[str, tuple[Text, ...]] = {}

    def find(self, traces: list[str], text: str) -> Encoded:
        known = (one for trace in traces for one in reversed(self.texts.get(trace, ())))
        return find(known, text, self._cuts)

    def remember(self, trace: str, prompt: Encoded, answer: str, ids: list[int] | tuple[int, ...]) -> None:
        self.texts[trace] = remember(self.texts.get(trace, ()), Said(prompt, answer, pack_tokens(ids)))


def memory() -> Memory:
    return Memory()


def encode(texts: Memory, text: str, tool: FakeText, trace: str = "t") -> Encoded:
    known = texts.find([trace], text)
    assert text.startswith(known.text)
    rest = text[len(known.text) :]
    return extend(known, text, tool.encode(rest) if rest else [], CUTS)


def test_generated_ids_are_kept_though_a_fresh_tokenization_differs() -> None:
    texts, tool = memory(), FakeText()
    first = encode(texts, USER + "hi" + END + ASSISTANT, tool)
    generated = list(b"the abc")  # a tokenizer would merge these
    texts.remember("t", first, "the abc", generated)
    second = encode(texts, first.text + "the abc" + END + USER + "more" + END + ASSISTANT, tool)
    assert second.ids[: len(first.ids) + len(generated)] == first.ids + generated
    assert second.ids != FakeText().encode(second.text)
    assert tool.encoded[-1] == END + USER + "more" + END + ASSISTANT, "only what is new was tokenized"


def test_a_third_step_builds_on_the_second() -> None:
    texts, tool = memory(), FakeText()
    prompt = encode(texts, USER + "hi" + END + ASSISTANT, tool)
    for answer in ("the ab", "c the", "é"):
        texts.remember("t", prompt, answer, list(answer.encode()))
        kept = prompt.ids + list(answer.encode())
        prompt = encode(texts, prompt.text + answer + END + USER + "go on" + END + ASSISTANT, tool)
        assert prompt.ids[: len(kept)] == kept


def test_an_edited_answer_keeps_the_prompt_up_to_its_last_safe_cut() -> None:
    texts, tool = memory(), FakeText()
    first = encode(texts, USER + "long ago" + END + ASSISTANT, tool)
    texts.remember("t", first, "yes", list(b"yes"))
    # The edit begins with a newline, which merges with the one that the prompt ends with.
    edited = first.text + "\nno" + END + USER
    assert encode(texts, edited, tool).ids == FakeText().encode(edited)
    assert tool.encoded[-1] == END + ASSISTANT + "\nno" + END + USER


def test_the_same_prompt_again_is_not_tokenized() -> None:
    texts, tool = memory(), FakeText()
    first = encode(texts, USER + "hi" + END + ASSISTANT, tool)
    texts.remember("t", first, "yes", list(b"yes"))
    calls = len(tool.encoded)
    assert encode(texts, first.text, tool).ids == first.ids
    assert len(tool.encoded) == calls


def test_a_prompt_that_goes_on_inside_a_word_is_cut_earlier() -> None:
    texts, tool = memory(), FakeText()
    first = encode(texts, "x" + END + "th", tool)
    texts.remember("t", first, "", ())
    assert encode(texts, "x" + END + "the", tool).ids == FakeText().encode("x" + END + "the")


def test_branches_of_a_trace_are_remembered_side_by_side() -> None:
    texts, tool = memory(), FakeText()
    first = encode(texts, USER + "hi" + END + ASSISTANT, tool)
    texts.remember("t", first, "the", list(b"the"))
    texts.remember("t", first, "abc", list(b"abc"))
    for answer in ("the", "abc"):
        known = texts.find(["t"], first.text + answer + END)
        assert known.ids == first.ids + list(answer.encode())


def test_other_traces_know_nothing_but_a_parent_can_be_asked() -> None:
    texts, tool = memory(), FakeText()
    first = encode(texts, USER + "hi" + END + ASSISTANT, tool)
    texts.remember("t", first, "the", list(b"the"))
    assert texts.find(["u"], first.text).ids == []
    assert texts.find(["u", "t"], first.text + "the").ids == first.ids + list(b"the")


def test_branches_are_limited() -> None:
    texts, tool = memory(), FakeText()
    for at in range(TEXTS_MAX + 2):
        texts.remember("t", encode(texts, f"{at}{END}", tool), "", ())
    assert len(texts.texts["t"]) == TEXTS_MAX
    assert texts.find(["t"], f"1{END}").ids == []
    assert texts.find(["t"], f"9{END}").ids != []


def test_tokens_are_shared_with_a_context_that_has_them() -> None:
    texts = memory()
    prompt = fresh("hi" + END, [1, 2, IM_END], [(2, 2)])
    texts.remember("t", prompt, "abc", [3, 4, 5])
    (text,) = texts.texts["t"]
    for more in ((), (3,), (3, 4), (3, 4, 5), (3, 4, 5, 6)):
        context = pack_tokens([1, 2, IM_END, *more])
        shared = text.sharing(context)
        assert shared.packed is context
        assert (shared.shared, len(shared.rest)) == (3 + min(3, len(more)), 4 * max(0, 3 - len(more)))
        for characters, tokens in ((3, 3), (3, 5), (3, 6)):
            assert shared.take(characters, tokens) == text.take(characters, tokens)
        assert shared.sharing(pack_tokens([9])) is shared
    assert text.sharing(pack_tokens([1, 2, IM_END, 4])) is text


def test_without_cut_tokens_only_whole_texts_are_reused() -> None:
    texts = Memory(CutTokens({}))
    texts.remember("t", fresh("ab", [1], []), "c", [2])
    assert texts.find(["t"], "abcdef").ids == [1, 2]
    assert texts.find(["t"], "abd").ids == []


PIECES = st.lists(st.sampled_from(["a", "b", "c", " the", "th", "e", "\n", "é", "🙂", END, USER]), max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, min_size=2, max_size=5))
def test_without_generated_text_any_history_of_edits_gives_fresh_ids(steps: list[list[str]]) -> None:
    texts, tool = memory(), FakeText()
    for pieces in steps:
        text = "".join(pieces)
        encoded = encode(texts, text, tool)
        assert encoded.ids == FakeText().encode(text)
        texts.remember("t", encoded, "", ())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(PIECES, PIECES, st.booleans()), min_size=2, max_size=5))
def test_with_generated_text_the_ids_always_spell_the_prompt(turns: list[tuple[list[str], list[str], bool]]) -> None:
    texts, tool, history = memory(), FakeText(), ""
    for said, answered, edited in turns:
        history += USER + "".join(said) + END + ASSISTANT
        prompt = encode(texts, history, tool)
        assert "".join(spell(tool, prompt.ids)) == history
        answer = "".join(p for p in answered if p not in (END, USER))
        texts.remember("t", prompt, answer, list(answer.encode()))
        history += ("changed" if edited else answer) + END
        if not edited:
            kept = prompt.ids + list(answer.encode())
            assert encode(texts, history, tool).ids[: len(kept)] == kept


def spell(tool: FakeText, ids: list[int]) -> str:
    data = b"".join(bytes([i]) if i < 256 else tool.token_text(i).encode() for i in ids)
    return data.decode()


def test_a_text_takes_the_same_memory_after_it_was_encoded() -> None:
    texts, prompt = memory(), fresh(USER + "h\u00e9, \u4e16" * 9, list(range(9)))
    texts.remember("t", prompt, " \u4e16", [5])
    (known,) = texts.texts["t"]
    before = known.nbytes
    msgspec.msgpack.encode(known.text)
    assert known.nbytes == before >= len(known.text.encode())
