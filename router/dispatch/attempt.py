"""One attempt at a step: its messages to one worker, and what comes back."""

from collections.abc import Sequence

from router.dispatch.bills import Bills
from router.dispatch.inflight import InFlight
from router.dispatch.relief import Relief
from router.dispatch.run import Run
from router.dispatch.steps import Finished, Output
from router.fleet.load import Warm
from router.policy.placement import Placement
from tracehaul.rpc.base import Replies
from tracehaul.runtime import clock
from tracehaul.wire.errors import ClusterError, ProtocolError
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.messages import Reply
from tracehaul.wire.steps import StepDone, StepUsage, Tokens

Events = list[Output | Finished]


class Attempt:
    """From when a step is sent to its workers until it ends there; must be closed.

    Args:
        run: the step; what the worker tells is added to ``run.emitted``.
        placement: where.
        replies: the worker's; nothing is sent before :meth:`next`.
        sent: its entries in the fleets' books.
        relief: left as soon as the prompt is computed.
        bills: told what the workers have spent.
    """

    def __init__(
        self, run: Run, placement: Placement, replies: Replies, sent: InFlight, relief: Relief, bills: Bills
    ) -> None:
        self.placement = placement
        self.emitted_before = len(run.emitted)
        """Of the step, by other attempts."""
        self._run = run
        self._replies = replies
        self._sent = sent
        self._relief = relief
        self._bills = bills
        self._computed = False
        """The worker has told of tokens: the prompt is."""
        self._retained: int | None = None
        """Of the sequence, in tokens, as the worker tells in the end."""
        self._scored = 0
        self._failure: ClusterError | None = None
        """Raised once what came before it was returned."""
        if run.tell is not None:
            replies.divert(self._divert)

    async def next(self) -> Events:
        """What the worker has told since the last call, in order: tokens that came together are one output. Waits for
        something. Ends with :class:`Finished`, which nothing follows.

        Raises:
            ClusterError, BetterPlace: as :meth:`Replies.take` and :meth:`Run.waiting`.
        """
        if self._failure is not None:
            raise self._failure
        with self._run.waiting():
            replies = await self._replies.take()
        events: Events = []
        for reply in _merged(replies):
            if not self._take(reply, events):
                break
        if not replies:
            self._failure = ProtocolError(f"{self.placement.decode.node} ended a step without a terminal message")
        if not events and self._failure is not None:
            raise self._failure
        return events

    async def close(self) -> None:
        """It is over; what the worker still does for it is not wanted."""
        self._sent.ended()
        self._relief.leave(self._run, self.placement)
        retained, decode = self._retained, self.placement.decode
        if retained is None and self._computed:
            retained = self._run.request.prompt_tokens + len(self._run.emitted) - 1
        if retained:
            self._run.warm = Warm(decode.node, decode.generation, retained)
        await self._replies.aclose()

    def _divert(self, reply: Reply) -> bool:
        """Told at once, as nearly all can be, a token costs a third."""
        run = self._run
        if not (self._computed and isinstance(reply, Tokens) and reply.ids) or reply.usage or reply.logprobs:
            return False
        tokens = unpack_tokens(reply.ids)
        assert run.tell is not None
        if not run.tell(tokens):
            return False
        run.emitted += tokens
        return True

    def _take(self, reply: Reply, events: Events) -> bool:
        """Add what a reply tells; False: nothing may follow it."""
        run = self._run
        match reply:
            case Tokens(b"", prompt_logprobs=scores):
                events.append(Output([], prompt_logprobs=run.scored(self._scored, scores)))
                self._scored += len(scores)
                return True
            case Tokens(ids, usage, logprobs):
                if not self._computed:
                    self._computed = True
                    self._sent.token(clock.now_s())
                    self._relief.leave(run, self.placement)
                tokens = unpack_tokens(ids)
                run.emitted += tokens
                if usage is None:
                    events.append(Output(tokens, logprobs=logprobs))
                else:
                    run.published_tokens = run.request.prompt_tokens  # before it is told, the prompt is written
                    self._billed(usage, done=False)
                    events.append(Output(tokens, run.account(usage), run.attribute(), logprobs))
                return True
            case StepDone(reason, usage, retained_tokens, published_tokens):
                self._retained, run.published_tokens = retained_tokens, published_tokens
                self._billed(usage, done=True)
                events.append(Finished(reason, run.account(usage), run.attribute()))
            case _:
                node = self.placement.decode.node
                self._failure = ProtocolError(f"{node} answered a step with {type(reply).__name__}")
        return False

    def _billed(self, usage: StepUsage, *, done: bool) -> None:
        step, helper = self._run.request.step, self.placement.helper
        self._bills.told(self.placement.decode, step, usage.reading, done=done)
        if helper is not None:
            self._bills.told(helper, step, usage.prefill_reading, done=done)


def _merged(replies: Sequence[Reply]) -> list[Reply]:
    """The same with tokens of which nothing else is told in one message."""
    merged: list[Reply] = []
    ids: list[bytes] = []
    for reply in replies:
        if isinstance(reply, Tokens) and reply.ids and reply.usage is None and reply.logprobs is None:
            ids.append(reply.ids)
            continue
        if ids:
            merged.append(Tokens(b"".join(ids)))
            ids = []
        merged.append(reply)
    if ids:
        merged.append(Tokens(b"".join(ids)))
    return merged
