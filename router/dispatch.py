"""Runs steps on the fleet: places them, follows their tokens, moves them when a worker fails."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator

import msgspec

from router.index import Index
from router.members import MemberRegistry
from router.policy.placement import Candidate, Placement, place
from router.steps import Finished, ModelCard, NodeStatus, Output, StepRequest
from router.traces import Trace, Traces, Warm
from router.watch import StoreWatch
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.peers import Peers
from tracehaul.wire.errors import ClusterError, ContextTooLong, ProtocolError, Unavailable
from tracehaul.wire.hashing import chain, pack_tokens, salted, unpack_tokens
from tracehaul.wire.ids import NodeId
from tracehaul.wire.messages import DecodeStep, NodeInfo, StepDone, StepUsage, Tokens

log = logging.getLogger(__name__)


class DispatchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator may set on the router's dispatching."""

    traces_max: int = 10_000
    """Traces remembered."""
    attempts_max: int = 4
    """Workers tried in a row without a new token before a step fails."""
    retry_pause_s: float = 0.2
    """Pause before the next attempt: membership needs a moment to notice a death."""
    idle_timeout_s: float = 5.0
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
    prefill_fallbacks: int = 0


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
        ended = False
        try:
            async for event in self._attempts(request, trace):
                ended = isinstance(event, Finished)
                if isinstance(event, Finished):
                    self._count(event.usage)
                yield event
        except ClusterError:
            ended = True
            self.stats.steps_failed += 1
            raise
        finally:
            self.stats.steps_aborted += not ended
            self.traces.end(request.trace, final=request.final)

    async def _attempts(self, request: StepRequest, trace: Trace) -> AsyncGenerator[Output | Finished, None]:
        """The step on one worker after the other, until one finishes it. Emitted tokens are never sampled again."""
        emitted: list[int] = []
        failures = 0
        while True:
            before = len(emitted)
            try:
                placement = self._place(request, trace, emitted)
                async for event in self._on_worker(request, trace, placement, emitted):
                    yield event
                return
            except ClusterError as error:
                failures = 1 if len(emitted) > before else failures + 1
                if not error.retriable or failures >= self._config.attempts_max:
                    raise
                self.stats.steps_moved += 1
                log.warning("step %s: attempt failed after %d tokens: %s", request.step, len(emitted), error)
            await asyncio.sleep(self._config.retry_pause_s * failures)

    def _place(self, request: StepRequest, trace: Trace, emitted: list[int]) -> Placement:
        decodes = self.members.live("decode")
        if not decodes:
            raise Unavailable("no decode worker is ready")
        prompt_tokens = len(request.prompt) + len(emitted)
        if prompt_tokens >= max(worker.context_max for worker in decodes):
            raise ContextTooLong(f"{prompt_tokens} tokens do not fit any worker's context")
        chosen = [worker for worker in decodes if worker.node == request.decode]
        root = salted(decodes[0].root, request.salt)
        placement = place(
            trace=request.trace,
            prompt_tokens=prompt_tokens,
            stored_tokens=self.index.match(chain(root, pack_tokens(request.prompt), decodes[0].block_tokens))
            * decodes[0].block_tokens,
            warm=trace.warm,
            home=trace.home,
            decodes=self._candidates(chosen or decodes),
            prefills=self._candidates(self.members.live("prefill")),
            stores=self._candidates(self.members.live("store")),
        )
        assert placement is not None
        trace.home = placement.home
        log.info(
            "step %s of trace %s: %d tokens, decode %s (%s), prefill %s, home %s, expecting %d tokens warm",
            request.step,
            request.trace,
            prompt_tokens,
            placement.decode.node,
            placement.reason,
            placement.prefill,
            placement.home,
            placement.expected_tokens,
        )
        return placement

    def _candidates(self, nodes: list[NodeInfo]) -> list[Candidate]:
        return [Candidate(info.node, info.generation, self._running[info.node]) for info in nodes]

    async def _on_worker(
        self, request: StepRequest, trace: Trace, placement: Placement, emitted: list[int]
    ) -> AsyncGenerator[Output | Finished, None]:
        """One attempt; appends to ``emitted`` what it yields."""
        node = placement.decode.node
        info = next(info for info in self.members.live("decode") if info.node == node)
        message = DecodeStep(
            step=request.step,
            trace=request.trace,
            prompt=pack_tokens(request.prompt),
            emitted=pack_tokens(emitted),
            salt=request.salt,
            home=placement.home,
            prefill=placement.prefill,
            sampling=request.sampling,
        )
        context = CallContext(trace=request.trace, step=request.step)
        self._running[node] += 1
        replies = self._peers.stream(info.address, message, idle_timeout_s=self._config.idle_timeout_s, context=context)
        try:
            async for reply in replies:
                match reply:
                    case Tokens(ids, usage):
                        tokens = unpack_tokens(ids)
                        emitted.extend(tokens)
                        yield Output(tokens, usage)
                    case StepDone(reason, usage, retained_tokens):
                        trace.warm = Warm(node, placement.decode.generation, retained_tokens)
                        yield Finished(reason, usage)
                        return
                    case _:
                        raise ProtocolError(f"{node} answered a step with {type(reply).__name__}")
            raise ProtocolError(f"{node} ended a step without a terminal message")
        finally:
            self._running[node] -= 1
            await replies.aclose()

    def _count(self, usage: StepUsage) -> None:
        self.stats.steps_finished += 1
        self.stats.prompt_tokens += usage.prompt_tokens
        self.stats.cached_tokens += usage.computed_from
        self.stats.output_tokens += usage.output_tokens
        self.stats.missed_blocks += usage.missed_blocks
        self.stats.prefill_fallbacks += usage.prefill_fallback != ""
