"""What was said in a trace, with the token ids it was said in. Pure.

An agent's next prompt is mostly its last prompt and the model's answer. Tokenizing that text afresh may give other
ids than the model generated, and other ids are other KV blocks. So a trace remembers its texts together with their
ids, and only what is new is tokenized.

A text may be cut only where tokenizing both sides separately gives what tokenizing the whole gives. That holds right
before a *cut token*: one that the tokenizer splits the text at before anything else (the model's end-of-turn tokens).
The end of what the model generated is used as a cut even elsewhere: its ids are what the KV was computed for.
"""

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import chain

import msgspec
import numpy as np

from tracehaul.wire.hashing import TOKEN_BYTES, pack_tokens, unpack_tokens

TEXTS_MAX = 8
"""Branches that a trace's tree of texts keeps open."""
WIDE_BYTES = 4
"""Of a character in a text that is not all ASCII."""
TEXT_BYTES = 450
"""Of a text without what grows with it."""


class Encoded(msgspec.Struct, frozen=True, gc=False):
    """A text in tokens, and where it may be cut."""

    text: str
    packed: bytes
    """Its tokens in wire form."""
    cuts: bytes = b""
    """For each cut token, the characters and the tokens before it: unsigned integers of 32 bits."""
    turns: bytes = b""
    """The messages that it tells: see :mod:`router.traces.turns`."""
    dated_s: float = 0.0
    """The time that it tells, in seconds since 1970: of its trace's first step. 0: none is known."""

    @property
    def ids(self) -> list[int]:
        """Its tokens, unpacked."""
        return unpack_tokens(self.packed)


class Said(msgspec.Struct, frozen=True, gc=False):
    """A prompt and what the model answered."""

    prompt: Encoded
    """As it was run."""
    answer: str = ""
    """As the client has it, so as the next prompt will quote it."""
    generated: bytes = b""
    """The tokens that it came in (wire form), without the stop token."""
    turns: bytes = b""
    """The prompt's messages and the answer, as in :class:`Encoded`."""
    model: str = ""
    """Whose they are: another has others for the same text."""


def fresh(text: str, ids: Sequence[int], cuts: Iterable[tuple[int, int]] = ()) -> Encoded:
    """A text with its tokens, and the cuts as (characters, tokens)."""
    return Encoded(text, pack_tokens(ids), _packed_cuts(cuts))


EMPTY = Encoded("", b"")


class CutTokens:
    """The tokens before which a text may be cut, by the text that the tokenizer reads them from."""

    def __init__(self, texts: Mapping[str, int], model: str = "") -> None:
        self.model = model
        """Whose they are."""
        self._ids = tuple(dict.fromkeys(texts.values()))
        self._texts = dict(texts)
        longest_first = sorted((t for t in texts if t), key=lambda t: (-len(t), t))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def at(self, text: str, start: int) -> bool:
        """True if a cut token starts there."""
        return self._pattern is not None and self._pattern.match(text, start) is not None

    def after(self, text: str, start: int) -> int | None:
        """Where the first cut token begins that is not before ``start``; None if there is none."""
        found = self._pattern.search(text, start) if self._pattern is not None else None
        return None if found is None else found.start()

    def find(self, text: str, packed: bytes) -> list[tuple[int, int]]:
        """Cuts of a freshly tokenized text; none where text and ids do not tell the same story."""
        if self._pattern is None:
            return []
        found = [(match.start(), self._texts[match.group()]) for match in self._pattern.finditer(text)]
        if not found:
            return []
        tokens = np.frombuffer(packed, "<u4")
        indexes = np.flatnonzero(reduce(np.logical_or, [tokens == token for token in self._ids]))
        if tokens[indexes].tolist() != [token for _, token in found]:
            return []
        return [(offset, index) for index, (offset, _) in zip(indexes.tolist(), found, strict=True)]


def extend(known: Encoded, text: str, rest_ids: list[int], cut_tokens: CutTokens) -> Encoded:
    """All of ``text``, of which ``known`` is the beginning and ``rest_ids`` are the tokens of what follows."""
    offset, index = len(known.text), len(known.packed) // TOKEN_BYTES
    rest = pack_tokens(rest_ids)
    cuts = _packed_cuts((offset + o, index + i) for o, i in cut_tokens.find(text[offset:], rest))
    return Encoded(text, known.packed + rest, known.cuts + cuts)


class Text(msgspec.Struct, frozen=True, gc=False):
    """One remembered text: a prompt and what the model said to it.

    Its tokens are the first ``shared`` of ``packed``, then ``rest``: the context that the step left has nearly the
    same ones, and both refer to one copy.
    """

    text: str
    packed: bytes
    shared: int
    rest: bytes
    prompt_end: tuple[int, int]
    """Characters and tokens of the prompt."""
    generated: bool
    """The text's end is the end of a model's output."""
    cuts: bytes
    """As in :class:`Encoded`."""
    model: str
    """As in :class:`Said`."""
    turns: bytes = b""
    """As in :class:`Said`."""
    dated_s: float = 0.0
    """As in :class:`Encoded`."""

    @property
    def tokens(self) -> int:
        """Its length."""
        return self.shared + len(self.rest) // TOKEN_BYTES

    @property
    def nbytes(self) -> int:
        """Memory that it takes without ``packed``, about: the same at all times, as the trace's is summed once. Text
        that is not ASCII is in memory in UTF-8, too, once it was written down."""
        characters = len(self.text) * (1 if self.text.isascii() else WIDE_BYTES)
        return characters + len(self.rest) + len(self.cuts) + len(self.turns) + TEXT_BYTES

    def sharing(self, packed: bytes) -> "Text":
        """With its tokens in ``packed``, if they begin alike."""
        known = self.packed[: self.shared * TOKEN_BYTES]
        if packed is self.packed or not packed.startswith(known):
            return self
        more = packed[len(known) : len(known) + len(self.rest)]
        if not self.rest.startswith(more):
            return self
        shared = self.shared + len(more) // TOKEN_BYTES
        return msgspec.structs.replace(self, packed=packed, shared=shared, rest=self.rest[len(more) :])

    def usable(self, text: str, cut_tokens: CutTokens) -> tuple[int, int]:
        """How much of ``text``, in characters and tokens, can be taken from here."""
        common = common_prefix(text, self.text)
        whole = common == len(self.text)
        if whole and (self.generated or common == len(text) or cut_tokens.at(text, common)):
            return common, self.tokens
        prompt_end = self.prompt_end[0]
        if common >= prompt_end and (len(text) == prompt_end or cut_tokens.at(text, prompt_end)):
            return self.prompt_end
        cuts = memoryview(self.cuts).cast("I")
        place = bisect_right(cuts[::2], common)
        # The cut token at the first difference may be part of that difference: then it is no cut in the new text.
        while place > 0:
            place -= 1
            if cut_tokens.at(text, cuts[2 * place]):
                return cuts[2 * place], cuts[2 * place + 1]
        return 0, 0

    def take(self, characters: int, tokens: int) -> Encoded:
        """The beginning."""
        cuts = memoryview(self.cuts).cast("I")
        count = min(bisect_right(cuts[::2], characters), bisect_left(cuts[1::2], tokens))
        packed = self.packed[: min(tokens, self.shared) * TOKEN_BYTES]
        if tokens > self.shared:
            packed += self.rest[: (tokens - self.shared) * TOKEN_BYTES]
        return Encoded(self.text[:characters], packed, self.cuts[: 2 * count * cuts.itemsize])


def remember(texts: Sequence[Text], said: Said) -> tuple[Text, ...]:
    """A trace's texts with one more, without those that it continues; the oldest give way."""
    prompt = said.prompt
    new = Text(
        prompt.text + said.answer,
        prompt.packed,
        len(prompt.packed) // TOKEN_BYTES,
        said.generated,
        (len(prompt.text), len(prompt.packed) // TOKEN_BYTES),
        bool(said.generated),
        prompt.cuts,
        said.model,
        said.turns,
        prompt.dated_s,
    )
    others = [known for known in texts if known.model != new.model or not new.text.startswith(known.text)]
    return (*others[-(TEXTS_MAX - 1) :], new)


def find(texts: Iterable[Text], text: str, cut_tokens: CutTokens) -> Encoded:
    """The longest beginning of ``text`` whose ids are known from one of ``texts``, of equals from the first one; empty
    if none is."""
    best, source = (0, 0), None
    for known in texts:
        usable = known.usable(text, cut_tokens) if known.model == cut_tokens.model else (0, 0)
        if usable > best:
            best, source = usable, known
    return source.take(*best) if source else EMPTY


def _packed_cuts(cuts: Iterable[tuple[int, int]]) -> bytes:
    return array("I", chain.from_iterable(cuts)).tobytes()


def common_prefix(a: str, b: str) -> int:
    """Length of the longest common beginning, by bisection: comparing slices runs at memory speed."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
