"""What calls remember of traces, and look up in them: the one place that knows where it is kept."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from router.calls.limits import CallLimits
from router.traces.book import Book
from router.traces.prefixes import Place, Prefixes
from router.traces.texts import CutTokens, Encoded, TraceTexts, extend
from tracehaul.wire.ids import TraceId

TraceKey = tuple[str, TraceId]
"""Tenant and trace."""


class ResponseTraces:
    """Which trace a response was given in, for calls that name the response; the oldest are forgotten."""

    def __init__(self, responses_max: int = 16384) -> None:
        self._responses_max = responses_max
        self._traces: OrderedDict[str, TraceId] = OrderedDict()

    def get(self, response: str) -> TraceId | None:
        """None if it is unknown or forgotten."""
        return self._traces.get(response)

    def put(self, response: str, trace: TraceId) -> None:
        """Remember it."""
        self._traces[response] = trace
        if len(self._traces) > self._responses_max:
            self._traces.popitem(last=False)


class Memory:
    """One model's traces. ``cut_tokens``: its end tokens by their texts."""

    def __init__(self, book: Book, cut_tokens: Mapping[str, int], limits: CallLimits) -> None:
        self._book = book
        self._cut_tokens = CutTokens(cut_tokens)
        self._texts = TraceTexts(self._cut_tokens, traces_max=limits.traces_max, bytes_max=limits.texts_bytes_max)
        self._prefixes = Prefixes(limits.messages_max)
        self._responses = ResponseTraces()

    def place(self, conversation: Sequence[bytes], opening: int, fresh: TraceId) -> Place:
        """The trace of a call without a name, by what was said: see :meth:`router.traces.prefixes.Prefixes.place`."""
        return self._prefixes.place(conversation, opening, fresh)

    def known(self, traces: Sequence[TraceKey], text: str) -> Encoded:
        """The longest beginning of ``text`` whose ids are known in one of ``traces``; empty if none is."""
        return self._texts.find(traces, text)

    def extended(self, known: Encoded, text: str, rest_ids: list[int]) -> Encoded:
        """All of ``text``, of which ``known`` is the beginning and ``rest_ids`` are the ids of the rest. Pure."""
        return extend(known, text, rest_ids, self._cut_tokens)

    def said(self, trace: TraceKey, prompt: Encoded, text: str, ids: Sequence[int]) -> None:
        """A step of ``trace`` ended: the answer to ``prompt`` is ``text``, generated as ``ids``; a stop token is none
        of them."""
        self._texts.remember(trace, prompt, text, ids)

    def called(self, trace: TraceKey, tools: tuple[str, ...]) -> None:
        """What the answer of its last step calls, once that is known."""
        self._book.called(*trace, tools)

    def answering(self, response: str, trace: TraceId) -> None:
        """A response is given in ``trace``."""
        self._responses.put(response, trace)

    def answered(self, response: str) -> TraceId | None:
        """The trace that a response was given in; None if it is unknown or forgotten."""
        return self._responses.get(response)
