"""Text to tokens and back, and the chat template: what the router needs of a model, without torch."""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, NFKC
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import TemplateProcessing

from tracehaul.model.counting import at_least
from tracehaul.model.gguf_file import GGUFError, read_gguf
from tracehaul.model.literal import MARK, Literals
from tracehaul.model.revision import revision
from tracehaul.model.source import ModelSource, SourceError
from tracehaul.model.templates import ChatTemplate
from tracehaul.wire.errors import InvalidRequest

SHRINKS_MAX = 4
"""Bytes of text that Unicode's composition makes one of, at most: three Hangul letters of three bytes become one of
three, and a letter with its marks hardly more."""
_CONTROL, _USER_DEFINED = 3, 4
_BYTE = re.compile(r"<0x[0-9A-F]{2}>", re.ASCII)
_SPACE = "\u2581"
"""How SentencePiece writes a space, and, before it, a byte that is no text."""
_END_NAMES = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>")


class TextStream(Protocol):
    """Turns one step's output tokens into text as they come."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that ``tokens`` completed; never part of a character, which waits for its rest."""
        ...

    def finish(self) -> str:
        """What is left: an unfinished character becomes U+FFFD. The stream ends."""
        ...


class Text:
    """A model's tokenizer and chat template. Stateless and cheap to share; streams are made per step."""

    def __init__(
        self, tokenizer: Tokenizer, chat_template: str | None, special: dict[str, str], eos_tokens: tuple[int, ...]
    ) -> None:
        """``special`` holds what templates may name: ``bos_token`` and such."""
        self._tokenizer = tokenizer
        self._plain: Tokenizer | None = None
        """The same, which takes special tokens for text; once it was needed."""
        self.template = None if chat_template is None else ChatTemplate(chat_template, special)
        """None if the model has none."""
        self._bytes = _token_bytes(tokenizer) if _is_byte_level(tokenizer) else None
        self._bytes_max = _token_bytes_max(tokenizer, self._bytes)
        """Of text in one token; 0: not known."""
        added = tokenizer.get_added_tokens_decoder()
        self._hidden = frozenset(token for token, entry in added.items() if entry.special)
        self._literals = Literals(entry.content for entry in added.values() if entry.special)
        self.eos_tokens = eos_tokens
        """Tokens that end a turn or a text; at least one for any model that ends by itself."""
        self.revision = ""
        """Which edition of the model's files it is of; empty: not known."""

    @classmethod
    def load(cls, source: ModelSource) -> "Text":
        """Read a model's tokenizer and template.

        Raises:
            SourceError: a needed file is missing or damaged, or its tokenizer is of an unknown kind.
        """
        try:
            text = _from_gguf(source.path) if source.kind == "gguf" else _from_folder(source.path)
            text.revision = revision(source)
            return text
        except jinja2.TemplateSyntaxError as error:
            raise SourceError(f"{source.name}: bad chat template: {error}") from error
        except (GGUFError, OSError) as error:
            raise SourceError(f"{source.name}: cannot read the tokenizer: {error}") from error
        except KeyError as error:
            raise SourceError(f"{source.name}: the tokenizer's files lack {error}") from error

    @property
    def chat_template(self) -> str | None:
        """The template's source; None if the model has none."""
        return None if self.template is None else self.template.source

    @property
    def vocab_size(self) -> int:
        """Token ids are below this (the model's own table may be padded further)."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def serialized(self) -> str:
        """The tokenizer as ``tokenizer.json`` would have it."""
        return self._tokenizer.to_str()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of ``text``. Special tokens written out in it are recognized, but for those that :meth:`render` was
        given in messages.

        ``special``: with what the model wants around a plain prompt, such as a begin token; rendered templates
        bring their own.
        """
        if MARK in text and not special:
            return self._literals.encode(text, self._encode_plain, self.special_token)
        # A batch of one: unlike a single text it is tokenized without holding the interpreter's lock.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids

    def _encode_plain(self, text: str) -> list[int]:
        if self._plain is None:
            plain = Tokenizer.from_str(self._tokenizer.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        return self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def tokens_min(self, characters: int) -> int:
        """So many tokens a text of that length has at least; 0 where the tokenizer's rules do not tell."""
        if not self._bytes_max:
            return 0
        return -(-characters // self._bytes_max)  # a character has at least a byte

    def tokens_at_least(self, text: str, enough: int) -> int:
        """So many tokens ``text`` has at least, counted up to about ``enough``: see
        :func:`tracehaul.model.counting.at_least`."""
        return at_least(self._tokenizer, text, enough)

    def raw(self, tokens: Sequence[int]) -> str:
        """Full text of ``tokens``, special ones included; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def token_text(self, token: int) -> str:
        """Text of one token, special or not; part of a character shows as U+FFFD."""
        return self.raw([token])

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 of one token, special or not; of part of a character its part. Empty for ids beyond the vocabulary."""
        if self._bytes is not None:
            return self._bytes[token] if token < len(self._bytes) else b""
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if _BYTE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()

    def special_token(self, text: str) -> int | None:
        """The special token of that text; None if there is none."""
        token = self._tokenizer.token_to_id(text)
        return token if token in self._hidden else None

    def stream(self, shown: Sequence[str] | None = ()) -> TextStream:
        """An incremental decoder for one step's output; of special tokens it shows those in ``shown``, or all: None."""
        texts = map(self.token_text, self._hidden) if shown is None else shown
        shown_tokens = {token: text for text in texts if (token := self.special_token(text)) is not None}
        hidden = self._hidden - shown_tokens.keys()
        if self._bytes is not None:
            return _ByteStream(self._bytes, hidden)
        return _WindowStream(self._tokenizer, hidden, shown_tokens)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        now_s: float | None = None,
    ) -> str:
        """The prompt that the model's chat template makes of a conversation; encode it without ``special``. Special
        tokens spelled out in messages and tools stay text: they are marked.

        Args:
            messages, tools, add_generation_prompt, variables, now_s: as in
                :meth:`tracehaul.model.templates.ChatTemplate.render`.

        Raises:
            InvalidRequest: the model has no template, or the template does not take these messages.
        """
        if self.template is None:
            raise InvalidRequest("this model has no chat template: use plain completions")
        mark = self._literals.mark
        return self.template.render(mark(list(messages)), mark(tools), add_generation_prompt, mark(variables), now_s)


class _ByteStream:
    """For byte-level vocabularies: every token is bytes, so a UTF-8 decoder holds the only state."""

    def __init__(self, table: list[bytes], hidden: frozenset[int]) -> None:
        self._table = table
        self._hidden = hidden
        self._held = b""
        """Of a character, what came of it."""

    def push(self, tokens: Sequence[int]) -> str:
        data, table, hidden = self._held, self._table, self._hidden
        for token in tokens:
            # An id beyond the vocabulary can come from a padded output layer: it has no text.
            if token not in hidden and token < len(table):
                data += table[token]
        text, read = codecs.utf_8_decode(data, "replace", False)
        self._held = data[read:]
        return text

    def finish(self) -> str:
        data, self._held = self._held, b""
        return data.decode(errors="replace")


class _WindowStream:
    """For other vocabularies (SentencePiece style), where a token's text depends on what is before it."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], shown: dict[int, str]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._shown = shown
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        parts: list[str] = []
        for token in tokens:
            if token in self._hidden:
                continue
            if token in self._shown:
                parts += (self.finish(), self._shown[token])
                continue
            self._held.append(token)
            if part := self._stream.step(self._tokenizer, token):
                parts.append(part)
                self._held.clear()
        return "".join(parts)

    def finish(self) -> str:
        held, self._held = self._held, []
        return self._tokenizer.decode(held, skip_special_tokens=False) if held else ""


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer.decoder, ByteLevelDecoder)


def _token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Bytes of each token by id, undoing the byte-level alphabet (GPT-2's): printable bytes stand for themselves,
    the others are shifted past 255 in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(shifted)}
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values()) + 1)
    for token, at in vocab.items():
        try:
            table[at] = bytes([alphabet[character] for character in token])
        except KeyError:  # an added token, written as plain text
            table[at] = token.encode()
    return table


def _token_bytes_max(tokenizer: Tokenizer, table: list[bytes] | None) -> int:
    """Bytes of text that a token stands for at most; 0 where the text may lose some before it is cut into tokens."""
    match tokenizer.normalizer:
        case None:
            shrinks = 1
        case NFC() | NFKC():
            shrinks = SHRINKS_MAX
        case _:
            return 0
    return shrinks * max(map(len, table)) if table else 0


# --- loading ------------------------------------------------------------------------------------------------


def _from_folder(path: Path) -> Text:
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the binding raises bare Exception for a missing or damaged file
        raise SourceError(f"{path / 'tokenizer.json'} cannot be read: {error}") from error
    config, generation = _json(path / "tokenizer_config.json"), _json(path / "generation_config.json")
    special = {
        key: _content(config[key]) for key in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(key)
    }
    ends = generation.get("eos_token_id", _json(path / "config.json").get("eos_token_id"))
    named = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    eos = dict.fromkeys([*_ints(ends), *_ints(named)])
    return Text(tokenizer, _folder_template(path, config), special, tuple(eos))


def _folder_template(path: Path, config: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found


def _from_gguf(path: Path) -> Text:
    metadata = read_gguf(path).metadata
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default"))
    pre = _pre_tokenizer(path, kind)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: at for at, token in enumerate(tokens)}
    # Merges that the vocabulary cannot hold would be refused; converters have left such behind.
    tokenizer = Tokenizer(BPE(vocab, [(a, b) for a, b in merges if a in vocab and b in vocab and a + b in vocab]))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = ByteLevelDecoder()
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    added = [(token, of) for token, of in zip(tokens, kinds, strict=False) if of in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=of == _CONTROL, normalized=False) for token, of in added])
    special = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    if metadata.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = TemplateProcessing(f"{bos} $A", None, [(bos, vocab[bos])])
    ends = [metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")]
    # Converters keep one end token only; the others are known by their names.
    controls = {token for token, of in added if of == _CONTROL}
    ends += [vocab[name] for name in _END_NAMES if name in controls]
    return Text(
        tokenizer,
        metadata.get("tokenizer.chat_template"),
        special,
        tuple(dict.fromkeys(e for e in ends if e is not None)),
    )


def _pre_tokenizer(path: Path, kind: tuple[Any, Any]) -> PreTokenizer:
    """How text is cut before merging. GGUF names it; the rules themselves are not in the file."""
    match kind:
        case ("gpt2", "smollm"):
            return PreTokenizers([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        case ("gpt2", "gpt-2"):
            return ByteLevel(add_prefix_space=False)
        case (model, pre):
            raise SourceError(f"{path}: GGUF tokenizer {model}/{pre} is not supported: use the model's hub folder")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object file; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"{path} is not JSON: {error}") from error


def _content(token: Any) -> str:
    """A special token as tokenizer configs write it: text, or an object with ``content``."""
    return token["content"] if isinstance(token, dict) else str(token)


def _ints(value: Any) -> list[int]:
    """None, one id, or a list of them."""
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list) else [int(value)]
