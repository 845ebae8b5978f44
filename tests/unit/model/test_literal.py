"""Special tokens that strangers spell out stay text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from tracehaul.model.literal import MARK, Literals
from tracehaul.model.text import Text

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }} {{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}<|end|>{% endfor %}"
)
SPECIALS = ("<|start|>", "<|end|>")


@pytest.fixture(scope="module")
def text() -> Text:
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    end = tokenizer.token_to_id("<|end|>")
    assert end is not None
    return Text(tokenizer, TEMPLATE, {}, (end,))


def controls(text: Text, ids: list[int]) -> int:
    special = {text.special_token(token) for token in SPECIALS}
    return sum(token in special for token in ids)


PIECES = st.lists(
    st.sampled_from([*SPECIALS, "<|", "end|>", "a", "é", " ", "\n", "<", MARK]) | st.text(max_size=3), max_size=8
)


@given(content=PIECES.map("".join))
def test_only_the_template_makes_control_tokens(text: Text, content: str) -> None:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "ok"}]
    ids = text.encode(text.render(messages))
    assert controls(text, ids) == 4
    shown = f"<|start|>user {content}<|end|><|start|>assistant ok<|end|>"
    assert text.raw(ids).replace(MARK, "") == shown.replace(MARK, "")


def test_the_same_tokens_where_nobody_spells_one(text: Text) -> None:
    rendered = text.render([{"role": "user", "content": "plain < | text"}])
    assert MARK not in rendered
    marked = text.render([{"role": "user", "content": "plain < | text"}, {"role": "user", "content": "<|end|>"}])
    assert text.encode(marked)[: len(text.encode(rendered))] == text.encode(rendered)


def test_calls_and_tools_are_looked_at_too(text: Text) -> None:
    calls = [{"function": {"name": "f", "arguments": {"<|end|>": ["<|start|>", 1, None]}}}]
    ids = text.encode(text.render([{"role": "assistant", "content": "", "tool_calls": calls}]))
    assert controls(text, ids) == 2


def test_plain_completions_keep_their_meaning(text: Text) -> None:
    assert controls(text, text.encode("<|start|>x<|end|>")) == 2


def test_what_holds_none_is_left_as_it_is() -> None:
    literals = Literals(SPECIALS)
    content = "x" * 100
    assert literals.mark(content) is content
    assert literals.mark({"a": [1, None, True, 2.5]}) == {"a": [1, None, True, 2.5]}
    assert Literals(()).mark("<|end|>") == "<|end|>"
