"""What was said in a trace, with the token ids it was said in.

An agent's next prompt is mostly its last prompt and the model's answer. Tokenizing that text afresh may give other
ids than the model generated, and other ids are other KV blocks. So a trace remembers its texts together with their
ids, and only what is new is tokenized.

A text may be cut only where tokenizing both sides separately gives what tokenizing the whole gives. That holds right
before a *cut token*: one that the tokenizer splits the text at before anything else (the model's end-of-turn tokens).
The end of what the model generated is used as a cut even elsewhere: its ids are what the KV was computed for.
"""

import re
import sys
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence

import msgspec

ENTRIES_PER_TRACE = 8
"""Branches that a trace's tree keeps open."""


class Encoded(msgspec.Struct, frozen=True):
    """A text in tokens, and where it may be cut: ``cuts[i]`` is (characters, tokens) before a cut token."""

    text: str
    packed: "array[int]"
    """Its tokens, four bytes each."""
    cuts: list[tuple[int, int]]

    @property
    def ids(self) -> list[int]:
        """Its tokens, unpacked."""
        return self.packed.tolist()


def fresh(text: str, ids: Sequence[int], cuts: list[tuple[int, int]]) -> Encoded:
    """A text with its tokens."""
    return Encoded(text, array("I", ids), cuts)


EMPTY = fresh("", (), [])


class CutTokens:
    """The tokens before which a text may be cut, by the text that the tokenizer reads them from."""

    def __init__(self, texts: Mapping[str, int]) -> None:
        self._ids = frozenset(texts.values())
        self._texts = dict(texts)
        longest_first = sorted((t for t in texts if t), key=lambda t: (-len(t), t))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def at(self, text: str, start: int) -> bool:
        """True if a cut token starts there."""
        return self._pattern is not None and self._pattern.match(text, start) is not None

    def find(self, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Cuts of a freshly tokenized text; none where text and ids do not tell the same story."""
        if self._pattern is None:
            return []
        found = [(match.start(), self._texts[match.group()]) for match in self._pattern.finditer(text)]
        indexes = [index for index, token in enumerate(ids) if token in self._ids]
        if len(found) != len(indexes) or any(ids[i] != t for i, (_, t) in zip(indexes, found, strict=True)):
            return []
        return [(offset, index) for index, (offset, _) in zip(indexes, found, strict=True)]


def extend(known: Encoded, text: str, rest_ids: list[int], cut_tokens: CutTokens) -> Encoded:
    """All of ``text``, of which ``known`` is the beginning and ``rest_ids`` are the tokens of what follows."""
    offset, index = len(known.text), len(known.packed)
    cuts = [(offset + o, index + i) for o, i in cut_tokens.find(text[offset:], rest_ids)]
    return Encoded(text, known.packed + array("I", rest_ids), known.cuts + cuts)


class _Entry:
    """One remembered text: a prompt and what the model said to it, packed."""

    def __init__(self, prompt: Encoded, output_text: str, output: Sequence[int]) -> None:
        self.text = prompt.text + output_text
        self.prompt_end = (len(prompt.text), len(prompt.packed))
        self.ids = prompt.packed + array("I", output)
        self.generated = bool(output)
        """The text's end is the end of a model's output."""
        self.cut_offsets = array("I", (offset for offset, _ in prompt.cuts))
        self.cut_indexes = array("I", (index for _, index in prompt.cuts))
        self.nbytes = sys.getsizeof(self.text) + 4 * (len(self.ids) + 2 * len(self.cut_offsets)) + 512

    def usable(self, text: str, cut_tokens: CutTokens) -> tuple[int, int]:
        """How much of ``text``, in characters and tokens, can be taken from here."""
        common = _common_prefix(text, self.text)
        whole = common == len(self.text)
        if whole and (self.generated or common == len(text) or cut_tokens.at(text, common)):
            return common, len(self.ids)
        prompt_end = self.prompt_end[0]
        if common >= prompt_end and (len(text) == prompt_end or cut_tokens.at(text, prompt_end)):
            return self.prompt_end
        place = bisect_right(self.cut_offsets, common)
        # The cut token at the first difference may be part of that difference: then it is no cut in the new text.
        while place > 0:
            place -= 1
            if cut_tokens.at(text, self.cut_offsets[place]):
                return self.cut_offsets[place], self.cut_indexes[place]
        return 0, 0

    def take(self, characters: int, tokens: int) -> Encoded:
        """The beginning."""
        count = bisect_right(self.cut_offsets, characters)
        cuts = [(o, i) for o, i in zip(self.cut_offsets[:count], self.cut_indexes[:count], strict=True) if i < tokens]
        return Encoded(self.text[:characters], self.ids[:tokens], cuts)


class TraceTexts:
    """Remembers texts with their ids, by trace. Pure; limited in traces and bytes, least recently used first out."""

    def __init__(self, cut_tokens: CutTokens, *, traces_max: int, bytes_max: int) -> None:
        self._cut_tokens = cut_tokens
        self._traces_max = traces_max
        self._bytes_max = bytes_max
        self._traces: OrderedDict[Hashable, list[_Entry]] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._traces)

    def find(self, traces: Sequence[Hashable], text: str) -> Encoded:
        """The longest beginning of ``text`` whose ids are known in one of ``traces``; empty if none is."""
        best, source = (0, 0), None
        for trace in traces:
            entries = self._traces.get(trace)
            if entries is None:
                continue
            self._traces.move_to_end(trace)
            for entry in reversed(entries):
                usable = entry.usable(text, self._cut_tokens)
                if usable > best:
                    best, source = usable, entry
        return source.take(*best) if source else EMPTY

    def remember(self, trace: Hashable, prompt: Encoded, output_text: str, output: Sequence[int]) -> None:
        """Keep ``prompt`` and what the model answered.

        Args:
            trace: what later prompts will be looked up by.
            prompt: the prompt as it was run.
            output_text: the answer as the client has it, so as the next prompt will quote it.
            output: the ids it came in, without the stop token.
        """
        entry = _Entry(prompt, output_text, output)
        entries = self._traces.setdefault(trace, [])
        self._traces.move_to_end(trace)
        for index in range(len(entries) - 1, -1, -1):
            if entry.text.startswith(entries[index].text):
                self.nbytes -= entries.pop(index).nbytes
        if len(entries) == ENTRIES_PER_TRACE:
            self.nbytes -= entries.pop(0).nbytes
        entries.append(entry)
        self.nbytes += entry.nbytes
        while len(self._traces) > self._traces_max or self.nbytes > self._bytes_max:
            _, dropped = self._traces.popitem(last=False)
            self.nbytes -= sum(e.nbytes for e in dropped)


def _common_prefix(a: str, b: str) -> int:
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
