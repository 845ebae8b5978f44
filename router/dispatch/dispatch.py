"""Runs steps on the fleet: places them, follows their tokens, moves them when a worker fails."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from itertools import zip_longest
from typing import Annotated

import msgspec
from msgspec import Meta

from router.dispatch.attempt import Attempt, Events
from router.dispatch.feasible import refusal, unable
from router.dispatch.inflight import InFlight
from router.dispatch.pooled import Pooled
from router.dispatch.predicted import TTL_S, Predicted
from router.dispatch.retainer import Retainer
from router.dispatch.run import BetterPlace, Run
from router.dispatch.steps import Finished, ModelCard, Output, StepRequest, Tell
from router.fleet.index import Index, TierRun
from router.fleet.load import Key
from router.fleet.members import MemberRegistry, NodeStatus, Terms
from router.fleet.pools import in_pool
from router.fleet.watch import StoreWatch
from router.policy.cost import StoredRun
from router.policy.placement import Ask, Placement, Policy, place
from router.policy.retention import RetentionConfig
from router.traces.book import Book
from router.traces.decisions import NODES_MAX, Moved, Placed, Replaced
from router.traces.effects import StopSteps
from router.traces.events import StepBegan, StepMoved, StepPlaced
from router.traces.hits import Hits
from router.traces.machine import Traces
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock, deadline
from tracehaul.runtime.log import Log
from tracehaul.wire.errors import (
    CannotContinue,
    ClusterError,
    ContextTooLong,
    DeadlineExceeded,
    InvalidRequest,
    Unavailable,
)
from tracehaul.wire.ids import NodeId
from tracehaul.wire.steps import StepUsage

log = Log(__name__)


class DispatchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator may set on the router's dispatching."""

    traces_max: Annotated[int, Meta(ge=1)] = 10_000
    """Traces remembered."""
    traces_bytes_max: Annotated[int, Meta(ge=0)] = 768 * 2**20
    """Memory for all that is known of them: texts, tokens, block hashes, steps and decisions, 10 bytes a token. Of a
    trace that is forgotten the next step is tokenized and hashed anew, and nobody can say what was lost of it."""
    answers_bytes_max: Annotated[int, Meta(ge=0)] = 256 * 2**20
    """Disk for what their models answered, which a restarted router goes on from: some kilobytes a step. 0: none is
    kept."""
    answers_max: Annotated[int, Meta(ge=1)] = 100_000
    """Answers kept there; where there are more, or they take more, those of the traces that have rested longest go."""
    policy: Policy = "cost"
    """How decode workers are chosen; ``sticky`` and ``round-robin`` are there to compare with."""
    use_store: bool = True
    """Without it no step reads the store or leaves anything there, and decode workers compute all that they lack:
    to compare with, too."""
    attempts_max: Annotated[int, Meta(ge=1)] = 4
    """Workers tried in a row without a new token before a step fails."""
    retry_pause_s: Annotated[float, Meta(ge=0)] = 0.2
    """Pause before the next attempt: membership needs a moment to notice a death."""
    retention: RetentionConfig = RetentionConfig()
    idle_timeout_s: Annotated[float, Meta(gt=0)] = 5.0
    """Longest silence of a decode worker (a living one proves itself every second)."""


class DispatchStats(msgspec.Struct):
    """Counters of the router's life, for metrics."""

    steps: int = 0
    steps_finished: int = 0
    steps_failed: int = 0
    steps_aborted: int = 0
    steps_moved: int = 0
    steps_replaced: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    missed_blocks: int = 0
    """Blocks that the store was said to hold and that did not arrive."""
    prefill_fallbacks: int = 0
    theoretical_tokens: int = 0
    """Of all steps that computed anything: what the trace had, as in :class:`router.traces.hits.Hits`."""
    indexed_tokens: int = 0
    chosen_tokens: int = 0
    delivered_tokens: int = 0
    recomputed_tokens: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Tokens that the trace had, computed again, by :data:`router.traces.hits.LossReason`."""
    pool_steps: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """Steps that finished, by pool; like those that follow."""
    pool_prompt_tokens: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    pool_cached_tokens: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    pool_output_tokens: dict[str, int] = msgspec.field(default_factory=dict[str, int])


class Dispatch:
    """The router without HTTP: implements :class:`router.dispatch.steps.Dispatcher`."""

    def __init__(self, peers: Peers, config: DispatchConfig, terms: Terms | None = None) -> None:
        self._peers = peers
        self._config = config
        self.stats = DispatchStats()
        self.index = Index()
        self._watch = StoreWatch(peers, self.index)
        self.members = MemberRegistry(self._watch.set_nodes, terms)
        self.pools: dict[str, Pooled] = {}
        """Of those that had a step, by name."""
        self._predicted = Predicted()
        self._sweeping: asyncio.TimerHandle | None = None
        self._turn = 0
        self._runs: dict[Run, None] = {}
        retention = config.retention if config.use_store else RetentionConfig(pins=False, recall=False)
        self.traces = Traces(config.traces_max, config.traces_bytes_max, retention)
        self.retainer = Retainer(peers, self.members, self.traces, self._stop)
        self.book = Book(self.traces, self.retainer)

    async def close(self) -> None:
        """Stop following the stores, and do nothing more for traces."""
        for pool in self.pools.values():
            pool.relief.close()
        if self._sweeping is not None:
            self._sweeping.cancel()
        await self.retainer.close()
        await self._watch.close()

    def model(self, name: str) -> ModelCard | None:
        pool = self.members.pools().get(name)
        if pool is None:
            return None
        workers = self.members.live("decode", pool.name)
        return ModelCard(name, min(worker.context_max for worker in workers), pool.name)

    def models(self) -> list[ModelCard]:
        return [card for name in sorted(self.members.pools()) if (card := self.model(name)) is not None]

    def nodes(self) -> list[NodeStatus]:
        return self.members.statuses()

    async def run(self, request: StepRequest, tell: Tell | None = None) -> AsyncGenerator[Output | Finished, None]:
        key = (request.salt, request.trace)
        began = StepBegan(
            key, request.step, request.parent, request.prompt_tokens, request.tools, request.agent, request.keep_s
        )
        self.retainer.send(began)
        self.stats.steps += 1
        run = Run(request, *self.traces.lefts(key), tell)
        self._runs[run] = None
        tries = _Tries()
        try:
            while True:
                for event in await self._next(run, tries):
                    if isinstance(event, Finished):
                        run.ending = event.reason
                        self._count(event.usage, request.pool)
                        yield event
                        return
                    yield event
        except ClusterError as error:
            run.ending = error.code
            self.stats.steps_failed += 1
            raise
        finally:
            await tries.leave()
            run.close()
            del self._runs[run]
            self.stats.steps_aborted += run.ending == "aborted"
            if run.hits is not None:
                self._count_hits(run, run.hits)
            self.retainer.send(run.over(self.retainer.reload_token_s(run.warm)))

    def _stop(self, effect: StopSteps) -> None:
        for run in self._runs:
            if run.key == effect.key and run.request.step in effect.steps:
                run.stop()

    async def _next(self, run: Run, tries: "_Tries") -> Events:
        """What happens next in the step, on one worker after the other until one finishes it. Emitted tokens are never
        sampled again."""
        while True:
            if tries.attempt is None:
                deadline.check(run.request.deadline_s)
            try:
                if tries.attempt is None:
                    tries.attempt = self._attempt(run, self._place(run))
                return await tries.attempt.next()
            except BetterPlace as better:
                attempt = await tries.leave()
                assert attempt is not None
                self.stats.steps_replaced += 1
                left = Replaced(run.request.step, attempt.placement.prefill, better.wait_s, better.cost_s)
                self.retainer.send(StepMoved(run.key, left))
            except ClusterError as error:
                attempt = await tries.leave()
                reason = run.ended()
                if reason is not None:  # only the terminal message was lost
                    usage = run.usage or StepUsage(prompt_tokens=run.request.prompt_tokens)
                    usage = msgspec.structs.replace(usage, output_tokens=len(run.emitted))
                    return [Finished(reason, usage, run.attribute())]
                self._failed(run, tries, attempt, error)
                async with deadline.until(run.request.deadline_s):
                    await asyncio.sleep(self._config.retry_pause_s * tries.failures)

    def _failed(self, run: Run, tries: "_Tries", attempt: Attempt | None, error: ClusterError) -> None:
        """An attempt failed (None: no worker was found for it); raises ``error`` if no other may follow."""
        grew = attempt is not None and len(run.emitted) > attempt.emitted_before
        tries.failures = 1 if grew else tries.failures + 1
        # A worker's own bug may be that worker's alone: one other may try.
        attempts_max = self._config.attempts_max if error.retriable else 2
        if isinstance(error, InvalidRequest | DeadlineExceeded | CannotContinue) or tries.failures >= attempts_max:
            raise error
        node = None
        if attempt is not None:
            node = attempt.placement.decode.node
            run.avoid.add(attempt.placement.decode)
        self.stats.steps_moved += 1
        self.retainer.send(StepMoved(run.key, Moved(run.request.step, node, error.code, len(run.emitted))))
        log.warning("an attempt failed", step=run.request.step, node=node, tokens=len(run.emitted), why=error)

    def _place(self, run: Run) -> Placement:
        decodes = self.members.live("decode", run.request.pool)
        if not decodes:
            raise Unavailable(f"no decode worker is ready{in_pool(run.request.pool)}")
        if (refused := refusal(decodes, run.needs)) is not None:
            raise refused
        tokens = run.request.prompt_tokens + len(run.emitted)
        longest = max(worker.context_max for worker in decodes)
        if tokens >= longest:
            message = (
                f"This model's maximum context length is {longest} tokens. However, you requested {tokens + 1} tokens"
            )
            raise ContextTooLong(message)
        run.cut(decodes[0])
        found = self.index.match(run.hashes)
        placement = self._price(run, found.runs, run.leaves)
        assert placement is not None
        warm, stored_tokens = run.warm, found.blocks * run.block_tokens
        lives = warm is not None and Key(warm.node, warm.generation) in self._pool(run).decodes.rows
        run.placed(placement, self._home(run), stored_tokens, warm_lives=lives)
        if placement.computes is not None:
            self._predicted.add(run.request.step, run.hashes, [placement.computes], clock.now_s())
            if self._sweeping is None:
                self._sweeping = asyncio.get_running_loop().call_later(TTL_S, self._sweep)
        self._turn += 1
        placed = self._placed(run, placement, stored_tokens)
        self.retainer.send(StepPlaced(run.key, placed, run.continues, run.takes(placement)))
        log.debug(
            "a step was placed",
            step=run.request.step,
            trace=run.request.trace,
            tokens=tokens,
            decode=placement.decode.node,
            reason=placement.reason,
            prefill=placement.prefill,
            home=placement.home,
            warm=placement.expected_tokens,
        )
        return placement

    def _sweep(self) -> None:
        """Hashes of thousands of prompts are tens of megabytes, and nobody may come to ask for them."""
        self._predicted.sweep(clock.now_s())
        again = len(self._predicted) > 0
        self._sweeping = asyncio.get_running_loop().call_later(TTL_S, self._sweep) if again else None

    def _elsewhere(self, run: Run, prefill: Key) -> Placement | None:
        """Where a step would be placed now if not by that prefill worker; None if nowhere."""
        return self._price(run, self.index.match(run.hashes).runs, run.leaves | {prefill})

    def _price(self, run: Run, stored: Sequence[TierRun], leaves: set[Key]) -> Placement | None:
        pool, now_s = self._pool(run), clock.now_s()
        decodes, prefills = (self.members.live(role, run.request.pool) for role in ("decode", "prefill"))
        for workers, fleet in ((decodes, pool.decodes), (prefills, pool.prefills)):
            fleet.sync(workers, self.members.loads(workers))
        expected = self._predicted.match(run.request.step, run.hashes, now_s)
        ask = Ask(
            trace=run.request.trace,
            prompt_tokens=run.request.prompt_tokens + len(run.emitted),
            stored=self._stored(stored, run.block_tokens),
            warm=run.warm,
            home=self._home(run),
            predicted={node: blocks * run.block_tokens for node, blocks in expected.items()},
            avoided=frozenset(run.avoid),
            unable=unable(decodes, run.needs),
            left=frozenset(leaves),
            asked=run.request.decode,
            turn=self._turn,
        )
        stores = [info.node for info in self.members.live("store")] if self._config.use_store else []
        return place(self._config.policy, ask, pool.decodes, pool.prefills, stores, now_s)

    def _stored(self, runs: Sequence[TierRun], block_tokens: int) -> list[StoredRun]:
        """With what it takes to bring each up: on the slowest node, as it may be on any."""
        if all(run.tier == 0 for run in runs):
            return [StoredRun(run.end * block_tokens, 0.0) for run in runs]
        block_s = [0.0]
        for load in self.members.loads(self.members.live("store")):
            below = [0.0, *(seconds for seconds in (load.disk_block_s, load.s3_block_s) if seconds)]
            block_s = [max(pair) for pair in zip_longest(block_s, below, fillvalue=0.0)]
        depth = len(block_s) - 1
        return [StoredRun(run.end * block_tokens, block_s[min(run.tier, depth)] / block_tokens) for run in runs]

    def _pool(self, run: Run) -> Pooled:
        name = run.request.pool
        if name not in self.pools:
            self.pools[name] = Pooled(self._predicted, self._elsewhere)
        return self.pools[name]

    def _home(self, run: Run) -> NodeId | None:
        trace = self.traces.get(run.key)
        return trace.home if trace is not None else None

    def _placed(self, run: Run, placement: Placement, stored_tokens: int) -> Placed:
        warm, decodes = run.warm, self._pool(run).decodes
        return Placed(
            step=run.request.step,
            decode=placement.decode.node,
            reason=placement.reason,
            prompt_tokens=run.request.prompt_tokens,
            indexed_tokens=stored_tokens,
            warm=warm.node if warm is not None else None,
            warm_tokens=warm.retained_tokens if warm is not None else 0,
            expected_tokens=placement.expected_tokens,
            prefill=placement.prefill,
            home=placement.home,
            running={key.node: decodes.running(key) for key in decodes.keys[:NODES_MAX]},
            cost_s=placement.cost_s,
            warm_cost_s=placement.warm_cost_s,
            pull_tokens=placement.pull_tokens,
            pool=run.request.pool,
        )

    def _attempt(self, run: Run, placement: Placement) -> Attempt:
        request, trace, pool = run.request, self.traces.get(run.key), self._pool(run)
        info = next(info for info in self.members.live("decode") if info.node == placement.decode.node)
        run.context_max = info.context_max
        parent = trace.parent if trace is not None else None
        replies = self._peers.stream(
            info.address,
            run.message(info, placement, parent),
            idle_timeout_s=self._config.idle_timeout_s,
            context=CallContext(trace=request.trace, step=request.step),
        )
        sent = InFlight(pool.decodes, pool.prefills, placement, clock.now_s())
        if self._config.policy == "cost" and run.prompt_logprobs is None:
            pool.relief.enter(run, placement)
        return Attempt(run, placement, replies, sent, pool.relief)

    def _count(self, usage: StepUsage, pool: str) -> None:
        for counts, tokens in (
            (self.stats.pool_steps, 1),
            (self.stats.pool_prompt_tokens, usage.prompt_tokens),
            (self.stats.pool_cached_tokens, usage.computed_from),
            (self.stats.pool_output_tokens, usage.output_tokens),
        ):
            counts[pool] = counts.get(pool, 0) + tokens
        self.stats.steps_finished += 1
        self.stats.prompt_tokens += usage.prompt_tokens
        self.stats.cached_tokens += usage.computed_from
        self.stats.output_tokens += usage.output_tokens
        self.stats.missed_blocks += usage.missed_blocks
        self.stats.prefill_fallbacks += usage.prefill_fallback != ""

    def _count_hits(self, run: Run, hits: Hits) -> None:
        self.stats.theoretical_tokens += hits.theoretical
        self.stats.indexed_tokens += hits.indexed
        self.stats.chosen_tokens += hits.chosen
        self.stats.delivered_tokens += hits.delivered
        changed = {} if hits.changed is None else {"prompt_changed": hits.changed.tokens}
        for reason, tokens in (hits.losses | changed).items():
            self.stats.recomputed_tokens[reason] = self.stats.recomputed_tokens.get(reason, 0) + tokens
        if sum(hits.losses.values()) >= run.block_tokens:
            log.warning("tokens were computed again", step=run.request.step, **hits.losses)


class _Tries:
    """Where a step is tried now, and how often it failed in a row without a new token."""

    def __init__(self) -> None:
        self.attempt: Attempt | None = None
        self.failures = 0

    async def leave(self) -> Attempt | None:
        """The attempt, if there is one, has ended."""
        attempt, self.attempt = self.attempt, None
        if attempt is not None:
            await attempt.close()
        return attempt
