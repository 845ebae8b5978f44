"""The default model's text against transformers; streams against whole decoding."""

import random
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse
from tokenizers.decoders import Sequence as Decoders
from tokenizers.models import BPE
from tokenizers.normalizers import Strip
from tokenizers.pre_tokenizers import Digits
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from tracehaul.model.source import ModelSource, SourceError, resolve
from tracehaul.model.text import Text
from tracehaul.wire.errors import InvalidRequest

TEXTS = [
    "Plain English, with punctuation; it's here!  Two spaces.\n\n\tTabs and newlines \n",
    "def f(x):\n    return {k: v**2 for k, v in x.items() if 0x1F < v <= 1234567890}  # 3.14e-10\n",
    "2024-01-02T03:04:05Z 007 1,000,000 12ab34 v1.2.3",
    "Grüße aus Köln — naïve café, Ελληνικά, русский, 日本語の文章、한국어 العربية हिन्दी",
    "😀👩‍👩‍👧‍👦🇩🇪 e\u0301 \u200b zero width \ufffd \x00 control",
    "<|im_start|>user\nspecial <|im_end|> inside <|endoftext|> and <|not_special|>",
    "",
    " ",
    "a" * 300,
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
    [
        {"role": "user", "content": "One\n"},
        {"role": "assistant", "content": " two <b>&amp;"},
        {"role": "tool", "content": '{"x": 1}'},
        {"role": "user", "content": "drei 😀"},
    ],
]
TOOLS_TEMPLATE = """
{%- if tools %}
    {{- "Tools: " }}
    {%- for tool in tools %}
        {%- if loop.index > 5 %}{% break %}{% endif %}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ["user", "assistant"] %}
        {{- raise_exception("no role " + message.role) }}
    {%- endif %}
    {%- if message.role == "assistant" %}{% generation %}{{ message.content }}{% endgeneration %}{% else %}
    {{- bos_token + message['content'] | trim }}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}>{% endif %}
"""


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.load(resolve())


@pytest.fixture(scope="module")
def oracle() -> Any:
    """transformers' conversion of the same file, with the digit rule that the conversion forgets."""
    from transformers import AutoTokenizer

    source = resolve()
    tokenizer = AutoTokenizer.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = PreTokenizers([Digits(individual_digits=True), backend.pre_tokenizer])
    return tokenizer


@pytest.mark.slow
def test_tokens_equal_those_of_transformers(text: Text, oracle: Any) -> None:
    for sample in TEXTS:
        assert text.encode(sample) == oracle.encode(sample, add_special_tokens=False), sample


@pytest.mark.slow
def test_chats_render_as_in_transformers(text: Text, oracle: Any) -> None:
    for chat in CHATS:
        for prompt in (True, False):
            expected = oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert text.render(chat, add_generation_prompt=prompt) == expected


def test_a_template_that_uses_everything_renders_as_in_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0, "<s>": 1}, [])), bos_token="<s>")
    tokenizer.chat_template = TOOLS_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    ours = Text.load(ModelSource("tiny", tmp_path, "hf", "llama"))
    chat = [{"role": "user", "content": " ä <x> "}, {"role": "assistant", "content": "b"}]
    tools = [{"type": "function", "function": {"name": "größe", "parameters": {"b": [1, "<&>"], "a": None}}}]
    for given_tools in (None, tools):
        expected = tokenizer.apply_chat_template(chat, tools=given_tools, tokenize=False, add_generation_prompt=True)
        assert ours.render(chat, given_tools) == expected
    with pytest.raises(InvalidRequest, match="no role tool"):
        ours.render([{"role": "tool", "content": "x"}])
    with pytest.raises(InvalidRequest):
        ours.render([{"role": 5}])  # the template adds it to a string


def test_templates_read_variables_but_not_instead_of_what_is_theirs(tmp_path: Path) -> None:
    Tokenizer(BPE({"a": 0, "<s>": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    given = "{{ bos_token }}{{ messages | length }}{{ tools }}{{ add_generation_prompt }}"
    (tmp_path / "chat_template.jinja").write_text(given + "|{{ enable_thinking }}{{ documents }}")
    ours = Text.load(ModelSource("tiny", tmp_path, "hf", "llama"))
    assert ours.render([]) == "<s>0NoneTrue|None"
    taken = {
        "bos_token": "x",
        "messages": [1, 2],
        "tools": [3],
        "add_generation_prompt": False,
        "enable_thinking": False,
    }
    assert ours.render([], variables=taken | {"documents": ["d"]}) == "<s>0NoneTrue|False['d']"


def test_special_tokens_are_shown_where_all_are(text: Text) -> None:
    tokens = text.encode("<|im_start|>a<|im_end|>")
    shown = {None: "<|im_start|>a<|im_end|>", ("<|im_end|>",): "a<|im_end|>", (): "a"}
    for names, expected in shown.items():
        stream = text.stream(names)
        assert stream.push(tokens) + stream.finish() == expected


def test_a_template_cannot_reach_into_the_process(tmp_path: Path) -> None:
    Tokenizer(BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequest):
        Text.load(ModelSource("bad", tmp_path, "hf", "llama")).render([])
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(SourceError, match="bad chat template"):
        Text.load(ModelSource("bad", tmp_path, "hf", "llama"))


def test_missing_tokenizers_and_templates_are_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        Text.load(ModelSource("none", tmp_path, "hf", "llama"))
    Tokenizer(BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InvalidRequest, match="no chat template"):
        Text.load(ModelSource("plain", tmp_path, "hf", "llama")).render([])


def test_ends_come_from_all_the_places_that_name_them(text: Text, tmp_path: Path) -> None:
    assert text.eos_tokens == (2, 0)
    assert text.token_text(2) == "<|im_end|>"
    tokenizer = Tokenizer(BPE({"a": 0, "b": 1, "</s>": 2}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert Text.load(ModelSource("x", tmp_path, "hf", "llama")).eos_tokens == (1, 2)


@given(st.lists(st.integers(0, 49_151), max_size=12), st.integers(0, 100))
@settings(max_examples=200)
def test_streams_say_what_whole_decoding_says(text: Text, tokens: list[int], seed: int) -> None:
    cuts = random.Random(seed)
    named = [text.token_text(token) for token in range(17)]
    for special in (False, True):
        stream, parts, at = text.stream(named if special else ()), list[str](), 0
        while at < len(tokens):
            end = at + cuts.randint(1, 3)
            parts.append(stream.push(tokens[at:end]))
            at = end
        parts.append(stream.finish())
        shown = [token for token in tokens if special or token > 16]
        assert "".join(parts) == text.raw(shown)


def test_no_part_of_a_character_is_shown(text: Text) -> None:
    for sample in TEXTS:
        stream = text.stream([text.token_text(token) for token in range(17)])
        parts = [stream.push([token]) for token in text.encode(sample)]
        assert "".join(parts) + stream.finish() == sample
        assert sample.count("\ufffd") == "".join(parts).count("\ufffd")
    half = text.encode("😀")[:-1]
    stream = text.stream()
    assert stream.push(half) == text.raw(half).rstrip("\ufffd")
    assert stream.finish() == "\ufffd"
    assert text.stream().push([49_151 + 100]) == ""


def test_vocabularies_with_byte_fallback_stream_too(tmp_path: Path) -> None:
    smile = "😀".encode()
    vocab = {"a": 0, "b": 1, **{f"<0x{byte:02X}>": 2 + at for at, byte in enumerate(sorted(set(smile)))}}
    tokenizer = Tokenizer(BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = Decoders([ByteFallback(), Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = Text.load(ModelSource("bytes", tmp_path, "hf", "llama"))
    ids = [0, *(vocab[f"<0x{byte:02X}>"] for byte in smile), 1]
    stream = ours.stream()
    assert [stream.push([token]) for token in ids] == ["a", "", "", "", "😀", "b"]
    assert stream.finish() == ""


def test_the_router_can_use_it_without_torch() -> None:
    import subprocess

    code = "import sys, tracehaul.model.text; sys.exit('torch' in sys.modules or 'gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(
    st.one_of(st.text(max_size=300), st.builds(lambda c, n: c * n, st.sampled_from(" \n=-*a0é"), st.integers(1, 900)))
)
def test_a_text_has_at_least_the_tokens_that_it_is_said_to_have(text: Text, sample: str) -> None:
    assert text.tokens_min(len(sample)) <= len(text.encode(sample))


def test_a_hopeless_length_is_told_without_tokenizing(text: Text, tmp_path: Path) -> None:
    assert text.tokens_min(len("word " * 800_000)) > 40_000
    tokenizer = Tokenizer(BPE({"a": 0}, []))
    tokenizer.normalizer = Strip()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Text.load(ModelSource("strips", tmp_path, "hf", "llama")).tokens_min(1000) == 0


def test_others_run_while_a_long_text_is_tokenized(text: Text) -> None:
    """By who holds the interpreter, not by time: a thread that only counts goes on while another tokenizes."""
    counts = [0]
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            counts[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = counts[0]
        text.encode("x y " * 50_000)
        assert counts[0] - before > 1000
    finally:
        done.set()
        thread.join()
