"""Texts counted in pieces: never more tokens than they have, and hardly fewer."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, PreTokenizer, Sequence, Split
from tokenizers.trainers import BpeTrainer

from tracehaul.model.counting import at_least
from tracehaul.model.source import resolve
from tracehaul.model.text import Text

PIECE = 40
LAST = 8
CORPUS = [
    "def count(words):\n    return [len(word) for word in words]\n\n",
    "it's 1234567 o'clock, we'll see … 漢字 é\n",
] * 20
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(pre: PreTokenizer | None, *, composed: bool = False) -> Tokenizer:
    """A small tokenizer that cuts text as ``pre`` does."""
    tokenizer = Tokenizer(BPE())
    if composed:
        tokenizer.normalizer = NFC()
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=500, special_tokens=["<|im_end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def served() -> Tokenizer:
    """The default model's."""
    return Tokenizer.from_str(Text.load(resolve()).serialized())


KINDS = {
    "served": served(),
    "gpt2": trained(ByteLevel(add_prefix_space=False)),
    "prefixed": trained(ByteLevel(add_prefix_space=True)),
    "cl100k": trained(
        Sequence([Split(Regex(CL100K), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]), composed=True
    ),
    "metaspace": trained(Metaspace()),
    "no words": trained(None),
}

pieces = st.sampled_from(
    [
        "the ",
        "word",
        "s",
        "'",
        "'ll",
        "12",
        "345",
        " ",
        "  ",
        "\n",
        "\n \n",
        "\t",
        "=",
        "--",
        "é",
        "e\u0301",
        "漢字",
        "😀",
    ]
    + ["<|im_end|>", "<|im_", "end|>", "Zürich", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]
)
texts = st.lists(st.one_of(pieces, st.text(max_size=8)), max_size=80).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(texts, st.integers(0, 400))
@example("a" * 1000, 100)
@example(" \n" * 300, 100)
@example("<|im_end|>" * 100, 50)
@example("we'll " * 100, 50)
def test_a_text_has_as_many_tokens_as_are_counted(kind: str, text: str, enough: int) -> None:
    whole = len(KINDS[kind].encode(text, add_special_tokens=False))
    counted = at_least(KINDS[kind], text, enough, PIECE, LAST)
    assert counted <= whole
    if counted < enough:  # then all of it was counted, but for the words that pieces begin with
        assert whole < enough or len(text) > PIECE


@pytest.mark.parametrize("kind", KINDS)
def test_hardly_any_are_left_out_and_nothing_is_counted_further_than_needs_be(kind: str) -> None:
    tokenizer, text = KINDS[kind], "".join(CORPUS) * 20
    whole = len(tokenizer.encode(text, add_special_tokens=False))
    assert at_least(tokenizer, text, 10 * whole, 4000, 16) >= 0.99 * whole
    assert at_least(tokenizer, text, 10 * whole) == whole  # one piece
    if kind != "no words":
        assert 500 <= at_least(tokenizer, text, 500, 1000, 16) < 2000
