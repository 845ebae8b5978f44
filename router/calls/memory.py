"""What calls remember of traces, and look up in them: the one place that knows where it is kept."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from router.traces.book import Book
from router.traces.kept import Kept
from router.traces.prefixes import Heard, Place
from router.traces.texts import Said, Text
from router.traces.trace import TraceKey
from tracehaul.wire.ids import StepId, TraceId


class Memory:
    """Of all models' traces."""

    def __init__(self, book: Book) -> None:
        self._book = book

    @contextmanager
    def placed(
        self,
        tenant: str,
        conversation: Sequence[bytes],
        opening: int,
        fresh: TraceId,
        *,
        first: bool,
        heard: Heard | None,
    ) -> Generator[Place, None, None]:
        """The trace of a call without a name, by what was said, for as long as the call lasts.

        Args:
            tenant: whose call it is.
            conversation: :func:`router.traces.prefixes.digests` of its messages.
            opening: how many of the first messages many conversations share.
            fresh: the trace's name if it is a new one.
            first: nothing in it was answered.
            heard: the last answer in it.
        """
        place = self._book.place(tenant, conversation, opening, fresh, first=first, heard=heard)
        try:
            yield place
        finally:
            self._book.over(tenant, place.trace)

    def found(
        self,
        tenant: str,
        conversation: Sequence[bytes],
        opening: int,
        fresh: TraceId,
        *,
        first: bool,
        heard: Heard | None,
    ) -> Place:
        """The same of a call that does not run: nothing is remembered of it."""
        return self._book.find(tenant, conversation, opening, fresh, first=first, heard=heard)

    def texts(self, traces: Sequence[TraceKey]) -> list[Text]:
        """What was said in ``traces``, of each the newest first."""
        return self._book.texts(traces)

    def keeps(self, traces: Sequence[TraceKey], *, former: bool) -> bool:
        """Whether answers of ``traces`` are kept: see :class:`router.traces.kept.Answers`."""
        return any(self._book.answers.known(trace, former=former) for trace in traces)

    async def kept(self, trace: TraceKey) -> list[Kept]:
        """A trace's answers, in the order in which they were given."""
        return await self._book.answers.read(trace)

    def placed_again(self, trace: TraceKey, *, all_of_them: bool) -> None:
        """See :meth:`router.traces.kept.Answers.placed`."""
        self._book.answers.placed(trace, all_of_them=all_of_them)

    def response(self, tenant: str, response: str) -> TraceId | None:
        """The trace in which a tenant was given a response; None if it is unknown or forgotten."""
        return self._book.response(tenant, response)

    def answered(
        self,
        trace: TraceKey,
        step: StepId,
        *,
        response: str | None,
        tools: tuple[str, ...] | None,
        said: Said | None,
        heard: str | None,
        final: bool,
    ) -> None:
        """A step is over for its client, in whatever way: once for each step.

        Args:
            trace: whose step it is.
            step: which.
            response: what later calls may name to go on from here.
            tools: what the answer calls; None where that is not known, or nothing is to follow.
            said: what was said; None likewise.
            heard: what calls are recognised by that go on from here; None: they have another name for the trace.
            final: it was answered, and the client says that nothing follows.
        """
        self._book.answered(*trace, step, response=response, tools=tools, said=said, heard=heard, final=final)
