"""What calls remember of traces, and look up in them: the one place that knows where it is kept."""

from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import msgspec

from router.calls.limits import CallLimits
from router.traces.book import Book
from router.traces.prefixes import Place, Prefixes
from router.traces.texts import CutTokens, Encoded, TraceTexts, extend
from tracehaul.wire.ids import StepId, TraceId

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


class Heard(msgspec.Struct, frozen=True):
    """What a step that ended is remembered by."""

    prompt: Encoded
    text: str
    """The answer as the client has it, so as the next prompt will quote it."""
    ids: Sequence[int]
    """What it was generated as, without a stop token."""


class Memory:
    """One model's traces. ``cut_tokens``: its end tokens by their texts."""

    def __init__(self, book: Book, cut_tokens: Mapping[str, int], limits: CallLimits) -> None:
        self._book = book
        self._cut_tokens = CutTokens(cut_tokens)
        self._texts = TraceTexts(self._cut_tokens, traces_max=limits.traces_max, bytes_max=limits.texts_bytes_max)
        self._prefixes = Prefixes(limits.messages_max)
        self._responses = ResponseTraces()

    @contextmanager
    def placed(
        self, tenant: str, conversation: Sequence[bytes], opening: int, fresh: TraceId
    ) -> Generator[Place, None, None]:
        """The trace of a call without a name, by what was said, for as long as the call lasts.

        Args:
            tenant: whose call it is.
            conversation: :func:`router.traces.prefixes.digests` of its messages.
            opening: how many of the first messages many conversations share.
            fresh: the trace's name if it is a new one.
        """
        yield self._prefixes.place(conversation, opening, fresh)

    def known(self, traces: Sequence[TraceKey], text: str) -> Encoded:
        """The longest beginning of ``text`` whose ids are known in one of ``traces``; empty if none is."""
        return self._texts.find(traces, text)

    def extended(self, known: Encoded, text: str, rest_ids: list[int]) -> Encoded:
        """All of ``text``, of which ``known`` is the beginning and ``rest_ids`` are the ids of the rest. Pure."""
        return extend(known, text, rest_ids, self._cut_tokens)

    def response(self, tenant: str, response: str) -> TraceId | None:
        """The trace in which a tenant was given a response; None if it is unknown or forgotten."""
        return self._responses.get(response)

    def answered(
        self,
        trace: TraceKey,
        step: StepId,
        *,
        response: str | None,
        tools: tuple[str, ...] | None,
        heard: Heard | None,
    ) -> None:
        """A step is over for its client, in whatever way: once for each step.

        Args:
            trace: whose step it is.
            step: which.
            response: what later calls may name to go on from here.
            tools: what the answer calls; None where that is not known, or nothing is to follow.
            heard: what was said; None likewise.
        """
        if response is not None:
            self._responses.put(response, trace[1])
        if heard is not None:
            self._texts.remember(trace, heard.prompt, heard.text, heard.ids)
        if tools is not None:
            self._book.called(*trace, tools)
