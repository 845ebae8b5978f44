"""Runs steps on the fleet: places them, follows their tokens, moves them when a worker fails."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from router.index import Index
from router.members import MemberRegistry
from router.policy.placement import Candidate, Placement, place
from router.steps import Finished, ModelCard, NodeStatus, Output, StepRequest
from router.traces import Trace, Traces, Warm
from router.watch import StoreWatch
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.peers import Peers
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import ClusterError, ContextTooLong, InvalidRequest, ProtocolError, Unavailable
from tracehaul.wire.hashing import chain, pack_tokens, salted, unpack_tokens
from tracehaul.wire.ids import BlockHash, Generation, NodeId
from tracehaul.wire.steps import DecodeStep, FinishReason, StepDone, StepUsage, Tokens

log = logging.getLogger(__name__)


LossReason = Literal["store_lost", "missed", "prefill_failed", "evicted"]
"""Why a trace's context had to be computed again: the store node that had it is gone; blocks did not arrive, or
arrived wrong; a prefill worker failed half-way; or it was no longer held by anybody."""


class DispatchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator may set on the router's dispatching."""

    traces_max: Annotated[int, Meta(ge=1)] = 10_000
    """Traces remembered."""
    attempts_max: Annotated[int, Meta(ge=1)] = 4
    """Workers tried in a row without a new token before a step fails."""
    retry_pause_s: Annotated[float, Meta(ge=0)] = 0.2
    """Pause before the next attempt: membership needs a moment to notice a death."""
    idle_timeout_s: Annotated[float, Meta(gt=0)] = 5.0
    """Longest silence of a decode worker (a living one proves itself every second)."""


class DispatchStats(msgspec.Struct):
    """Counters of the router's life, for metrics."""

    steps: int = 0
    steps_finished: int = 0
    steps_failed: int = 0
    steps_aborted: int = 0
    steps_moved: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    missed_blocks: int = 0
    """Blocks that the store was said to hold and that did not arrive."""
    prefill_fallbacks: int = 0
    recomputed_tokens: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Tokens that an earlier step of the same trace had computed, computed again, by :data:`LossReason`."""


class Dispatch:
    """The router without HTTP: implements :class:`router.steps.Dispatcher`."""

    def __init__(self, peers: Peers, config: DispatchConfig) -> None:
        self._peers = peers
        self._config = config
        self.stats = DispatchStats()
        self.index = Index()
        self.traces = Traces(config.traces_max)
        self._watch = StoreWatch(peers, self.index)
        self.members = MemberRegistry(self._watch.set_nodes)
        self._running: Counter[NodeId] = Counter()

    async def close(self) -> None:
        """Stop following the stores."""
        await self._watch.close()

    def model(self) -> ModelCard | None:
        workers = self.members.live("decode")
        if not workers:
            return None
        return ModelCard(workers[0].model, min(worker.context_max for worker in workers))

    def nodes(self) -> list[NodeStatus]:
        return self.members.statuses()

    async def run(self, request: StepRequest) -> AsyncGenerator[Output | Finished, None]:
        trace = self.traces.start(request.trace, request.parent)
        self.stats.steps += 1
        run = _Run(request, trace)
        ended = False
        try:
            async with aclosing(self._attempts(run)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        ended = True
                        self._count(run, event.usage)
                    yield event
        except ClusterError:
            ended = True
            self.stats.steps_failed += 1
            raise
        finally:
            if not ended:
                # The API ends a step that way at a stop string, too: what was computed is still worth coming back to.
                self.stats.steps_aborted += 1
                run.remember()
            self.traces.end(request.trace, final=request.final)

    async def _attempts(self, run: "_Run") -> AsyncGenerator[Output | Finished, None]:
        """The step on one worker after the other, until one finishes it. Emitted tokens are never sampled again."""
        failures = 0
        while True:
            before = len(run.emitted)
            placement: Placement | None = None
            try:
                placement = self._place(run)
                async with aclosing(self._on_worker(run, placement)) as events:
                    async for event in events:
                        yield event
                return
            except ClusterError as error:
                reason = run.ended()
                if reason is not None and run.usage is not None:  # only the terminal message was lost
                    yield Finished(reason, msgspec.structs.replace(run.usage, output_tokens=len(run.emitted)))
                    return
                failures = 1 if len(run.emitted) > before else failures + 1
                # A worker's own bug may be that worker's alone: one other may try.
                attempts_max = self._config.attempts_max if error.retriable else 2
                if isinstance(error, InvalidRequest) or failures >= attempts_max:
                    raise
                if placement is not None:
                    run.avoid.add((placement.decode.node, placement.decode.generation))
                self.stats.steps_moved += 1
                log.warning("step %s: attempt failed after %d tokens: %s", run.request.step, len(run.emitted), error)
            await asyncio.sleep(self._config.retry_pause_s * failures)

    def _place(self, run: "_Run") -> Placement:
        request, trace = run.request, run.trace
        decodes = self.members.live("decode")
        if not decodes:
            raise Unavailable("no decode worker is ready")
        tokens = len(request.prompt) + len(run.emitted)
        if tokens >= max(worker.context_max for worker in decodes):
            raise ContextTooLong(f"{tokens} tokens do not fit any worker's context")
        run.cut(decodes[0])
        # Blocks of another layout, or another model, are of no use to this step.
        decodes = [worker for worker in decodes if worker.root == decodes[0].root]
        prefills = [worker for worker in self.members.live("prefill") if worker.root == decodes[0].root]
        fresh = [worker for worker in decodes if (worker.node, worker.generation) not in run.avoid] or decodes
        asked = [worker for worker in fresh if worker.node == request.decode]
        placement = place(
            trace=request.trace,
            prompt_tokens=tokens,
            stored_tokens=self.index.match(run.hashes) * run.block_tokens,
            warm=trace.warm,
            home=trace.home,
            decodes=self._candidates(asked or fresh),
            prefills=self._candidates(prefills),
            stores=self._candidates(self.members.live("store")),
            asked=bool(asked),
            avoided=trace.warm is not None and (trace.warm.node, trace.warm.generation) in run.avoid,
        )
        assert placement is not None
        run.home_lost = run.home_lost or (trace.home is not None and trace.home != placement.home)
        trace.home = placement.home
        log.info(
            "step %s of trace %s: %d tokens, decode %s (%s), prefill %s, home %s, expecting %d tokens warm",
            request.step,
            request.trace,
            tokens,
            placement.decode.node,
            placement.reason,
            placement.prefill,
            placement.home,
            placement.expected_tokens,
        )
        return placement

    def _candidates(self, nodes: list[NodeInfo]) -> list[Candidate]:
        return [Candidate(info.node, info.generation, self._running[info.node]) for info in nodes]

    async def _on_worker(self, run: "_Run", placement: Placement) -> AsyncGenerator[Output | Finished, None]:
        """One attempt; appends to ``run.emitted`` what it yields."""
        request = run.request
        node = placement.decode.node
        info = next(info for info in self.members.live("decode") if info.node == node)
        message = DecodeStep(
            step=request.step,
            trace=request.trace,
            root=info.root,
            prompt=pack_tokens(request.prompt),
            emitted=pack_tokens(run.emitted),
            salt=request.salt,
            home=placement.home,
            prefill=placement.prefill,
            sampling=request.sampling,
        )
        context = CallContext(trace=request.trace, step=request.step)
        run.context_max = info.context_max
        retained = 0
        self._running[node] += 1
        replies = self._peers.stream(info.address, message, idle_timeout_s=self._config.idle_timeout_s, context=context)
        try:
            async for reply in replies:
                match reply:
                    case Tokens(ids, usage, logprobs):
                        tokens = unpack_tokens(ids)
                        run.emitted.extend(tokens)
                        retained = len(request.prompt) + len(run.emitted) - 1
                        yield Output(tokens, usage and run.account(usage), logprobs)
                    case StepDone(reason, usage, retained_tokens):
                        retained = retained_tokens
                        yield Finished(reason, run.account(usage))
                        return
                    case _:
                        raise ProtocolError(f"{node} answered a step with {type(reply).__name__}")
            raise ProtocolError(f"{node} ended a step without a terminal message")
        finally:
            self._running[node] -= 1
            if retained:
                run.trace.warm = Warm(node, placement.decode.generation, retained)
            await replies.aclose()

    def _count(self, run: "_Run", usage: StepUsage) -> None:
        self.stats.steps_finished += 1
        self.stats.prompt_tokens += usage.prompt_tokens
        self.stats.cached_tokens += usage.computed_from
        self.stats.output_tokens += usage.output_tokens
        self.stats.missed_blocks += usage.missed_blocks
        self.stats.prefill_fallbacks += usage.prefill_fallback != ""
        lost, reason = run.recomputed(usage)
        if lost:
            self.stats.recomputed_tokens[reason] = self.stats.recomputed_tokens.get(reason, 0) + lost
            log.warning("step %s: %d tokens were computed again (%s)", run.request.step, lost, reason)
        run.remember()


class _Run:
    """One step's way through the fleet."""

    def __init__(self, request: StepRequest, trace: Trace) -> None:
        self.request = request
        self.trace = trace
        self.emitted: list[int] = []
        self.usage: StepUsage | None = None
        """Of all attempts so far, as far as workers told."""
        self.context_max = 0
        """Of the worker that ran the last attempt."""
        self.avoid: set[tuple[NodeId, Generation]] = set()
        """Workers that failed it, while there are others."""
        self.home_lost = False
        self.hashes: list[BlockHash] = []
        """Of the prompt's full blocks."""
        self.block_tokens = 0
        self._root = BlockHash(b"")

    def cut(self, worker: NodeInfo) -> None:
        """Hash the prompt's blocks as that worker does; once, since a fleet serves one layout."""
        root = salted(worker.root, self.request.salt)
        if root != self._root:
            self._root, self.block_tokens = root, worker.block_tokens
            self.hashes = chain(root, pack_tokens(self.request.prompt), worker.block_tokens)

    def account(self, usage: StepUsage) -> StepUsage:
        """An attempt's usage as that of the whole step: what an earlier attempt computed was not cached."""
        if self.usage is not None:
            computed_from = min(usage.computed_from, self.usage.computed_from)
            usage = msgspec.structs.replace(usage, computed_from=computed_from)
        self.usage = usage
        return usage

    def ended(self) -> FinishReason | None:
        """Why nothing may follow what was emitted; None if something must."""
        if not self.emitted:
            return None
        length = len(self.request.prompt) + len(self.emitted)
        return self.request.sampling.finish_reason(self.emitted[-1], len(self.emitted), length, self.context_max)

    def recomputed(self, usage: StepUsage) -> tuple[int, LossReason]:
        """Tokens of full blocks that the trace's last step left and that somebody computed again, and why."""
        left = self.trace.blocks
        if not left or len(self.hashes) < left or self.hashes[left - 1] != self.trace.last_hash:
            return 0, "evicted"  # first step, or another prompt than that of the step before
        lost = max(0, left * self.block_tokens - usage.computed_from)
        if self.home_lost:
            return lost, "store_lost"
        if usage.prefill_fallback:
            return lost, "prefill_failed"
        return lost, "missed" if usage.missed_blocks else "evicted"

    def remember(self) -> None:
        """The step ended: its trace's context is the prompt and the output, whose last token has no KV."""
        if not self.emitted:
            return
        parent = self.hashes[-1] if self.hashes else self._root
        rest = self.request.prompt[len(self.hashes) * self.block_tokens :] + self.emitted[:-1]
        hashes = self.hashes + chain(parent, pack_tokens(rest), self.block_tokens)
        self.trace.blocks = len(hashes)
        self.trace.last_hash = hashes[-1] if hashes else None
