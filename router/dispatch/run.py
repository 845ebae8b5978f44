"""One step's way through the fleet: what it continues, what was expected of it, what came of it."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import msgspec

from router.dispatch.steps import StepRequest
from router.fleet.load import Key, Warm
from router.policy.placement import Placement
from router.traces.contexts import Cut, Left, cut
from router.traces.hits import Expected, Hits, Outcome, attribute
from router.traces.registry import Step, Trace
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import TraceDeleted
from tracehaul.wire.hashing import extend_chain, pack_tokens, salted
from tracehaul.wire.ids import BlockHash
from tracehaul.wire.messages import Reply
from tracehaul.wire.steps import FinishReason, StepUsage, TokenLogprobs


class BetterPlace(Exception):
    """An attempt ends: the step has a better place."""

    def __init__(self, wait_s: float, cost_s: float) -> None:
        super().__init__()
        self.wait_s = wait_s
        """What it had to go where it was."""
        self.cost_s = cost_s
        """What all of it costs at the better place."""


class Run:
    """One step, from its request to its end. ``lefts`` are the contexts that it may continue."""

    def __init__(self, request: StepRequest, trace: Trace, step: Step, lefts: list[Left]) -> None:
        self.request = request
        self.trace = trace
        self.step = step
        self.packed = pack_tokens(request.prompt)
        """The prompt in wire form."""
        self.emitted: list[int] = []
        self.scored_tokens = 0
        """Of the prompt, told in this or an earlier attempt."""
        self.usage: StepUsage | None = None
        """Of all attempts so far, as far as workers told."""
        self.context_max = 0
        """Of the worker that ran the last attempt."""
        self.avoid: set[Key] = set()
        """Workers that failed it, while there are others."""
        self.leaves: set[Key] = set()
        """Prefill workers that it does not wait for any more."""
        self.home_lost = False
        self.warm: Warm | None = None
        """Who holds how much of the prompt, as far as a worker told."""
        self.published_tokens = 0
        self.block_tokens = 0
        self._lefts = lefts
        self._root = BlockHash(b"")
        self._cut = Cut(b"", (), None, 0)
        self._expected: Expected | None = None
        self._warm_gone = False
        self._attempts = 0
        self._waiting: asyncio.Timeout | None = None
        self._better: BetterPlace | None = None

    @property
    def hashes(self) -> Sequence[BlockHash]:
        """Of the prompt's full blocks, once it was cut."""
        return self._cut.hashes

    @property
    def forks(self) -> bool:
        """Whether the context that it continues is its parent's."""
        return self._cut.left is not None and not any(own is self._cut.left for own in self.trace.lefts)

    def cut(self, worker: NodeInfo) -> None:
        """Hash the prompt's blocks as that worker does; once, since a fleet serves one layout."""
        root = salted(worker.root, self.request.salt)
        if root == self._root:
            return
        self._root, self.block_tokens = root, worker.block_tokens
        self._cut = cut(root, self.packed, worker.block_tokens, self._lefts)
        left = self._cut.left
        if left is None:
            return
        self.step.parent = left.step
        if left.warm is not None and self.warm is None:
            kept = min(left.warm.retained_tokens, self._cut.shared_tokens)
            # A worker gives another trace's context only to who continues all of it.
            if not self.forks or kept == left.warm.retained_tokens:
                self.warm = Warm(left.warm.node, left.warm.generation, kept)

    def takes(self, placement: Placement) -> Left | None:
        """The parent's context, if this step continues it there on the worker that kept it: nobody else can then."""
        warm = self.warm
        there = warm is not None and (warm.node, warm.generation) == placement.decode
        return self._cut.left if there and self.forks else None

    def placed(self, placement: Placement, stored_tokens: int, *, warm_lives: bool) -> None:
        """It was given a place. What counts for its hits is what was known before the first attempt."""
        self._attempts += 1
        self.home_lost = self.home_lost or (self.trace.home is not None and self.trace.home != placement.home)
        self.trace.home = placement.home
        self.step.decode, self.step.prefill = placement.decode.node, placement.prefill
        if self._expected is not None:
            return
        left, longest = self._cut.left, len(self.request.prompt) - 1  # the last token is always computed
        self._warm_gone = self.warm is not None and not warm_lives
        self._expected = Expected(
            # A prompt to be scored is computed whatever there is of it.
            theoretical=min(self._cut.shared_tokens, longest) if self.request.prompt_logprobs is None else 0,
            published=left.published_tokens if left is not None else 0,
            indexed=min(stored_tokens, longest),
            warm=min(self.warm.retained_tokens, longest) if self.warm is not None and warm_lives else 0,
            chosen=min(placement.expected_tokens, longest),
            block_tokens=self.block_tokens,
        )

    def account(self, usage: StepUsage) -> StepUsage:
        """An attempt's usage as that of the whole step: what an earlier attempt computed was not cached."""
        before = len(self.request.prompt)
        if self.usage is not None:
            before = self.usage.computed_from
        elif self._attempts > 1 and self._expected is not None:
            before = max(self._expected.indexed, self._expected.warm)
        usage = msgspec.structs.replace(usage, computed_from=min(usage.computed_from, before))
        self.usage = usage
        return usage

    @property
    def prompt_logprobs(self) -> int | None:
        """What the next attempt has to tell of the prompt; None where all of it was told."""
        return self.request.prompt_logprobs if self.scored_tokens < len(self.request.prompt) - 1 else None

    def scored(self, before: int, scores: Sequence[TokenLogprobs]) -> Sequence[TokenLogprobs]:
        """What is new in an attempt's ``scores``, which follow ``before`` others of it: it began anew."""
        new = scores[max(0, self.scored_tokens - before) :]
        self.scored_tokens += len(new)
        return new

    def hits(self) -> Hits:
        """What came of the context that it continues, as of now."""
        usage = self.usage
        if usage is None or self._expected is None:
            return Hits()
        self.step.hits = attribute(
            self._expected,
            Outcome(
                delivered=min(usage.computed_from, len(self.request.prompt)),
                missed_blocks=usage.missed_blocks,
                prefill_failed=usage.prefill_fallback != "",
                worker_failed=bool(self.avoid),
                home_lost=self.home_lost,
                warm_gone=self._warm_gone,
            ),
        )
        return self.step.hits

    def ended(self) -> FinishReason | None:
        """Why nothing may follow what was emitted; None if something must."""
        if not self.emitted:
            return None
        length = len(self.request.prompt) + len(self.emitted)
        return self.request.sampling.finish_reason(self.emitted[-1], len(self.emitted), length, self.context_max)

    def left(self) -> Left | None:
        """The step ended: what it leaves to the next; None if it computed nothing."""
        if not self.emitted:
            return None
        packed = self.packed + pack_tokens(self.emitted[:-1])
        hashes = extend_chain(self._root, packed, self.block_tokens, self._cut.hashes, len(self.request.prompt))
        return Left(self.step.step, self._root, self.block_tokens, packed, hashes, self.published_tokens, self.warm)

    # --- what others decide -----------------------------------------------------------------------------------

    async def next(self, replies: AsyncGenerator[Reply, None]) -> Reply | None:
        """The next of a worker's replies; None if there is none.

        Raises:
            TraceDeleted: :meth:`stop` was called, before or meanwhile.
            BetterPlace: :meth:`move` was called meanwhile.
            ClusterError: what ``replies`` raises.
        """
        deleted = TraceDeleted(f"trace {self.request.trace} was deleted")
        if self.trace.deleted:
            raise deleted
        try:
            async with asyncio.timeout(None) as self._waiting:
                return await anext(replies, None)
        except TimeoutError:
            raise (deleted if self.trace.deleted else self._better or deleted) from None
        finally:
            self._waiting = self._better = None

    def stop(self) -> None:
        """End it, from another task: its trace was deleted."""
        if self._waiting is not None:
            self._waiting.reschedule(0.0)

    def move(self, prefill: Key, wait_s: float, cost_s: float) -> None:
        """Place it anew, from another task, if it waits for that worker: see :class:`BetterPlace`."""
        if self._waiting is not None:
            self.leaves.add(prefill)
            self._better = BetterPlace(wait_s, cost_s)
            self._waiting.reschedule(0.0)
