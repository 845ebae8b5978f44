"""One step's way through the fleet: what it continues, what was expected of it, what came of it."""

import asyncio
from collections.abc import Sequence
from functools import cached_property

import msgspec

from router.dispatch.steps import StepRequest, Tell
from router.fleet.load import Key, Warm
from router.policy.feasible import Needs, needs_of
from router.policy.placement import Placement
from router.traces.asks import Begun
from router.traces.contexts import Cut, Left, cut, joined
from router.traces.events import StepEnded
from router.traces.hits import Expected, Hits, Outcome, attribute
from router.traces.trace import TraceKey
from tracehaul.runtime import deadline
from tracehaul.runtime.interruptible import Interruptible
from tracehaul.wire.answers import answer_name
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.errors import TraceDeleted
from tracehaul.wire.hashing import pack_tokens, token_count, unpack_tokens
from tracehaul.wire.ids import BlockHash, NodeId, StepId, TraceId
from tracehaul.wire.naming import Naming
from tracehaul.wire.spent import Allowance
from tracehaul.wire.steps import DecodeStep, FinishReason, StepUsage, TokenLogprobs

WORTH = ("aborted", "stop", "length", "deadline_exceeded", "budget_exceeded")
"""Endings after which what was computed is worth coming back to: the API aborts a step at a stop string, too."""
FAIR = ("aborted", "stop", "length")
"""Endings that a client does not answer by asking again: what it said was its trace's last step then was it."""


class BetterPlace(Exception):
    """An attempt ends: the step has a better place."""

    def __init__(self, wait_s: float, cost_s: float) -> None:
        super().__init__()
        self.wait_s = wait_s
        """What it had to go where it was."""
        self.cost_s = cost_s
        """What all of it costs at the better place."""


class Run:
    """One step, from its request to its end. It may continue the contexts that its parent left, and its own trace."""

    def __init__(
        self, request: StepRequest, parents: Sequence[Left], own: Sequence[Left], tell: Tell | None = None
    ) -> None:
        self.request = request
        self.tell = tell
        self.key: TraceKey = (request.salt, request.trace)
        self.ending = "aborted"
        """Its finish reason, or an error's code, as soon as there is one."""
        self.hits: Hits | None = None
        """What came of the context that it continues, as of now."""
        self.deleted = False
        """Its trace was, by the client."""
        self.emitted = unpack_tokens(request.begun.packed)
        self.scored_tokens = 0
        """Of the prompt, told in this or an earlier attempt."""
        self.usage = request.begun.usage
        """Of all attempts so far, as far as workers told."""
        self.context_max = 0
        """Of the worker that ran the last attempt."""
        self.avoid: set[Key] = set()
        """Workers that failed it, while there are others."""
        self.leaves: set[Key] = set()
        """Workers that it does not wait for any more."""
        self.waited_s = 0.0
        """For its turn."""
        self.heard = False
        """A worker has told something of it."""
        self.home_lost = False
        self.warm: Warm | None = None
        """Who holds how much of the prompt, as far as a worker told."""
        self.published_tokens = 0
        self.block_tokens = 0
        self._lefts = (*parents, *own)
        self._own = own
        self._naming = Naming(BlockHash(b""), 0)
        self._cut = Cut(b"", (), None, 0)
        self._expected: Expected | None = None
        self._changed = request.changed
        self._warm_gone = False
        self._attempts = 0
        self._grown = len(self.emitted)
        """What was told of by :meth:`grown`."""
        self._waits = Interruptible()
        self._deadline: asyncio.TimerHandle | None = None
        """Ends the wait during which it passes."""

    @cached_property
    def _answer(self) -> bytes:
        return answer_name(self._naming.tenant, self.request.prompt, self.request.sampling)

    def begun_by(self, load: NodeLoad) -> bool:
        """Whether a worker that says so has begun its answer, for a router that is gone; the prompt was cut."""
        return bool(load.orphans) and self._answer in load.orphans

    @property
    def hashes(self) -> Sequence[BlockHash]:
        """Of the prompt's full blocks, once it was cut."""
        return self._cut.hashes

    @property
    def needs(self) -> Needs:
        """What the next attempt takes of its worker."""
        return needs_of(self.request.sampling, scores=self.prompt_logprobs is not None, began=bool(self.emitted))

    @property
    def background(self) -> bool:
        """Whether workers let everything else go first."""
        return self.request.step_class == "background"

    @property
    def forks(self) -> bool:
        """Whether the context that it continues is its parent's."""
        return self._cut.left is not None and not any(own is self._cut.left for own in self._own)

    @property
    def continues(self) -> StepId | None:
        """The step whose context it continues."""
        return self._cut.left.step if self._cut.left is not None else None

    def cut(self, worker: NodeInfo) -> None:
        """Hash the prompt's blocks as that worker does; once, since a fleet serves one layout."""
        naming = Naming(worker.root, worker.block_tokens, worker.hashing, self.request.salt)
        if naming == self._naming:
            return
        self._naming, self.block_tokens = naming, worker.block_tokens
        self._cut = cut(naming, self.request.prompt, self._lefts)
        if self._lefts and self._changed is not None:
            had = token_count(self._lefts[-1].packed)
            self._changed = msgspec.structs.replace(self._changed, tokens=max(0, had - self._cut.shared_tokens))
        left = self._cut.left
        if left is not None and left.warm is not None and self.warm is None:
            kept = min(left.warm.retained_tokens, self._cut.shared_tokens)
            # A worker gives another trace's context only to who continues all of it.
            if not self.forks or kept == left.warm.retained_tokens:
                self.warm = Warm(left.warm.node, left.warm.generation, kept)

    def message(
        self, worker: NodeInfo, placement: Placement, parent: TraceId | None, allowance: Allowance | None = None
    ) -> DecodeStep:
        """What that worker is told; ``parent`` is the trace that started this one."""
        request = self.request
        return DecodeStep(
            step=request.step,
            trace=request.trace,
            root=worker.root,
            prompt=request.prompt,
            emitted=pack_tokens(self.emitted),
            salt=request.salt,
            home=placement.home,
            prefill=placement.prefill,
            sampling=request.sampling,
            family=parent or request.trace,
            pull_tokens=placement.pull_tokens,
            prompt_logprobs=self.prompt_logprobs,
            tenant=request.tenant,
            step_class=request.step_class,
            priority=request.priority,
            deadline_in_s=deadline.left_s(request.deadline_s),
            known_tokens=self._expected.theoretical if self._expected is not None else 0,
            allowance=allowance,
        )

    def takes(self, placement: Placement) -> bool:
        """Whether it continues its parent's context there on the worker that kept it: nobody else can then."""
        warm = self.warm
        return self.forks and warm is not None and (warm.node, warm.generation) == placement.decode

    def placed(self, placement: Placement, home: NodeId | None, stored_tokens: int, *, warm_lives: bool) -> bool:
        """It was given a place; ``home`` took its trace's blocks so far. What counts for its hits is what was known
        before the first attempt: True, if this is that."""
        self._attempts += 1
        self.home_lost = self.home_lost or (home is not None and home != placement.home)
        if self._expected is not None:
            return False
        left, longest = self._cut.left, self.request.prompt_tokens - 1  # the last token is always computed
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
        return True

    def account(self, usage: StepUsage) -> StepUsage:
        """An attempt's usage as that of the whole step: what an earlier attempt computed was not cached."""
        # Where nobody knows what was cached when it was begun, in another life: the last token was not.
        before = self.request.prompt_tokens - bool(self.request.begun.packed)
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
        return self.request.prompt_logprobs if self.scored_tokens < self.request.prompt_tokens - 1 else None

    def scored(self, before: int, scores: Sequence[TokenLogprobs]) -> Sequence[TokenLogprobs]:
        """What is new in an attempt's ``scores``, which follow ``before`` others of it: it began anew."""
        new = scores[max(0, self.scored_tokens - before) :]
        self.scored_tokens += len(new)
        return new

    def attribute(self) -> Hits:
        """What came of the context that it continues, as of now."""
        usage = self.usage
        if usage is None or self._expected is None:
            return Hits()
        hits = attribute(
            self._expected,
            Outcome(
                delivered=min(usage.computed_from, self.request.prompt_tokens),
                missed_blocks=usage.missed_blocks,
                prefill_failed=usage.prefill_fallback != "",
                worker_failed=bool(self.avoid),
                home_lost=self.home_lost,
                warm_gone=self._warm_gone,
            ),
        )
        self.hits = hits if self._changed is None else msgspec.structs.replace(hits, changed=self._changed)
        return self.hits

    def ended(self) -> FinishReason | None:
        """Why nothing may follow what was emitted; None if something must."""
        if not self.emitted:
            return None
        length = self.request.prompt_tokens + len(self.emitted)
        return self.request.sampling.finish_reason(self.emitted[-1], len(self.emitted), length, self.context_max)

    def over(self, reload_token_s: float) -> StepEnded:
        """It is over, whatever way; ``reload_token_s`` is what its worker takes to pull a token."""
        left = self._left() if self.emitted and self.ending in WORTH else None
        request = self.request
        final = request.final and self.ending in FAIR
        return StepEnded(
            self.key,
            request.step,
            self.ending,
            len(self.emitted),
            self.hits,
            left,
            reload_token_s,
            final,
            self._begun() if request.ask else None,
        )

    def grown(self) -> bytes | None:
        """The tokens so far, packed; None: there is none more than when they were asked for last."""
        if len(self.emitted) == self._grown:
            return None
        self._grown = len(self.emitted)
        return pack_tokens(self.emitted)

    def _begun(self) -> Begun:
        """What it begins with when it is asked for again."""
        packed = pack_tokens(self.emitted)
        match self.ending:
            case "stop" | "length" as ending:
                return Begun(packed, ending, self.usage, self.hits)
            case _:
                return Begun(packed, None, self.usage, self.hits)

    def _left(self) -> Left:
        """The context that it leaves to the next."""
        packed = self.request.prompt + pack_tokens(self.emitted[:-1])
        naming = self._naming
        hashes = naming.extend(packed, self._cut.hashes, self.request.prompt_tokens)
        return Left(
            self.request.step,
            naming.tenant,
            self.block_tokens,
            packed,
            joined(hashes),
            self.published_tokens,
            self.warm,
        )

    # --- what others decide -----------------------------------------------------------------------------------

    def waiting(self) -> Interruptible:
        """To wait for a worker in.

        Raises (or ends the wait with):
            TraceDeleted: :meth:`stop` was called, before or meanwhile.
            DeadlineExceeded: the step's deadline has passed, before or meanwhile.
            BetterPlace: :meth:`move` was called meanwhile.
        """
        if self.deleted:
            raise self._was_deleted()
        deadline_s = self.request.deadline_s
        if deadline_s is not None:
            deadline.check(deadline_s)
            if self._deadline is None:
                self._deadline = asyncio.get_running_loop().call_at(deadline_s, self._late)
        return self._waits

    def stop(self) -> None:
        """End it, from another task: its trace was deleted."""
        self.deleted = True
        self._waits.interrupt(self._was_deleted())

    def move(self, worker: Key, wait_s: float, cost_s: float) -> None:
        """Place it anew, from another task, if it waits for that worker: see :class:`BetterPlace`."""
        if self._waits.interrupt(BetterPlace(wait_s, cost_s)):
            self.leaves.add(worker)

    def close(self) -> None:
        """No wait follows."""
        if self._deadline is not None:
            self._deadline.cancel()

    def _late(self) -> None:
        self._waits.interrupt(deadline.exceeded())

    def _was_deleted(self) -> TraceDeleted:
        return TraceDeleted(f"trace {self.request.trace} was deleted")
