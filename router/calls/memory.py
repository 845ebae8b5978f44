"""What calls remember of traces, and look up in them: the one place that knows where it is kept."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from router.traces.asks import Ask, find
from router.traces.book import Book
from router.traces.kept import Kept
from router.traces.prefixes import Place, Sought
from router.traces.texts import Said, Text
from router.traces.trace import TraceKey
from tracehaul.wire.ids import StepId, TraceId


class Memory:
    """Of all models' traces."""

    def __init__(self, book: Book) -> None:
        self._book = book

    @contextmanager
    def placed(self, tenant: str, sought: Sought, fresh: TraceId) -> Generator[Place, None, None]:
        """The trace of a tenant's call, for as long as the call lasts; ``fresh`` if it is a new one."""
        place = self._book.place(tenant, sought, fresh)
        try:
            yield place
        finally:
            self._book.over(tenant, place.trace)

    async def arrive(self, tenant: str, trace: TraceId | None, sought: Sought | None, answer: str) -> None:
        """See :meth:`router.traces.book.Book.arrive`."""
        await self._book.arrive(tenant, trace, sought, answer)

    @property
    def elsewhere(self) -> bool:
        """Other routers have traces, too."""
        return self._book.elsewhere is not None

    def found(self, tenant: str, sought: Sought, fresh: TraceId) -> Place:
        """The same of a call that does not run: nothing is remembered of it."""
        return self._book.find(tenant, sought, fresh)

    def texts(self, traces: Sequence[TraceKey]) -> list[Text]:
        """What was said in ``traces``, of each the newest first."""
        return self._book.texts(traces)

    def asked(self, trace: TraceKey, name: bytes, within_s: float) -> Ask | None:
        """What came of a step of that name, which does not run any more; None: it was not asked for in that time."""
        return find(self._book.asks(trace), name, self._book.now_s() - within_s)

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
        done: bool,
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
            done: it was answered to its end.
        """
        self._book.answered(
            *trace, step, response=response, tools=tools, said=said, heard=heard, final=final, done=done
        )
