"""Runs steps on the fleet: places them, follows their tokens, moves them when a worker fails."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import msgspec

from router.adapt.story import Noted
from router.dispatch.adapting import Adapting
from router.dispatch.again import Growing, began, possible, told
from router.dispatch.attempt import Attempt, Events
from router.dispatch.bills import Bills
from router.dispatch.config import DispatchConfig
from router.dispatch.flips import FlipOutcome, Flips
from router.dispatch.gate import Gate
from router.dispatch.inflight import InFlight
from router.dispatch.line import Line, Needs
from router.dispatch.pooled import Books, Pooled
from router.dispatch.predicted import TTL_S, Predicted
from router.dispatch.pricing import Pricing
from router.dispatch.retainer import Retainer
from router.dispatch.room import Room
from router.dispatch.run import BetterPlace, Run
from router.dispatch.stats import DispatchStats
from router.dispatch.steps import Finished, ModelCard, Output, StepRequest, Tell
from router.fleet.index import Index, Match
from router.fleet.load import Key
from router.fleet.members import MemberRegistry, NodeStatus, Terms
from router.fleet.pools import in_pool
from router.fleet.watch import StoreWatch
from router.policy.feasible import refusal
from router.policy.placement import Placement
from router.policy.prices import Bill, Prices
from router.policy.retention import RetentionConfig
from router.policy.turns import served_s
from router.traces.book import Book
from router.traces.decisions import NODES_MAX, Moved, Placed, Replaced
from router.traces.effects import StopSteps
from router.traces.events import StepMoved, StepPlaced
from router.traces.hits import Hits
from router.traces.machine import Traces
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock, deadline
from tracehaul.runtime.log import Log
from tracehaul.wire.cluster import WorkerRole
from tracehaul.wire.errors import (
    BudgetExceeded,
    CannotContinue,
    ClusterError,
    ContextTooLong,
    DeadlineExceeded,
    InvalidRequest,
    Unavailable,
)
from tracehaul.wire.hashing import token_count
from tracehaul.wire.ids import NodeId, StepId
from tracehaul.wire.steps import StepUsage

log = Log(__name__)

FINAL = (InvalidRequest, DeadlineExceeded, BudgetExceeded, CannotContinue)
"""No other worker may try what has failed so."""


class Dispatch:
    """The router without HTTP: implements :class:`router.dispatch.steps.Dispatcher`."""

    def __init__(
        self, peers: Peers, config: DispatchConfig, terms: Terms | None = None, prices: Prices | None = None
    ) -> None:
        self._peers = peers
        self._config = config
        self.stats = DispatchStats()
        self.index = Index()
        self._watch = StoreWatch(peers, self.index)
        self.members = MemberRegistry(self._watch.set_nodes, terms, config.flips)
        self.flips = Flips(peers, self.members, config.flips)
        self.pools: dict[str, Pooled] = {}
        """Of those that had a step, by name."""
        self._predicted = Predicted()
        self.pricing = Pricing(config.policy, self.members, self._predicted, self.pools, stores=config.use_store)
        self._sweeping: asyncio.TimerHandle | None = None
        self.slack = Room(self.members, self.pools).now
        self._runs: dict[Run, None] = {}
        retention = config.retention if config.use_store else RetentionConfig(pins=False, recall=False)
        self.traces = Traces(config.traces_max, config.traces_bytes_max, retention)
        self.retainer = Retainer(peers, self.members, self.traces, self._stop)
        self.bills = Bills(self.traces, self.retainer.send, prices or Prices(config.tariff))
        self.members.listener = self.bills
        self._growing = Growing(self._runs, self.retainer.send)
        self.book = Book(self.traces, self.retainer)
        self.book.bills = self.bills
        self.gate = Gate(self.members, config.admission, self.stats, stores=config.use_store)
        self.line = Line(self._front, self._needs, self.stats)
        self.adapting = Adapting(config.adapt, self.flips, self.members, self.pools, self.pricing, self.traces)

    async def close(self) -> None:
        """Stop following the stores, and do nothing more for traces."""
        for pool in self.pools.values():
            pool.relief.close()
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._growing.close()
        await self.adapting.close()
        await self.flips.close()
        self.line.close()
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

    @property
    def unit(self) -> str:
        return self.bills.unit

    def bill(self, step: StepId) -> Bill:
        return self.bills.bill(step)

    def nodes(self) -> list[NodeStatus]:
        return self.members.statuses()

    async def flip(self, node: NodeId, role: WorkerRole) -> FlipOutcome:
        return await self.flips.flip(node, role)

    def changes(self, node: NodeId) -> Sequence[Noted]:
        return self.adapting.of(node)

    async def run(self, request: StepRequest, tell: Tell | None = None) -> AsyncGenerator[Output | Finished, None]:
        key = (request.salt, request.trace)
        if request.begun.packed:
            request = possible(request, self.members.live("decode", request.pool))
            self.stats.steps_again += 1
            self.stats.tokens_again += token_count(request.begun.packed)
            for event in told(request):
                yield event
                if isinstance(event, Finished):
                    return
        bill = self.bills.entered(key, request.tenant, request.limits, request.choices, clock.now_s())
        request = msgspec.structs.replace(request, deadline_s=deadline.sooner(request.deadline_s, bill.ends_s))
        self.gate.enter(request, known=self.traces.get(key) is not None)
        self.bills.began(request.step, bill, clock.now_s())
        self.retainer.send(began(request, clock.now_s()))
        if request.ask and self.traces.changed is not None:
            self._growing.watch()
        self.stats.steps += 1
        run = Run(request, *self.traces.lefts(key), tell)
        self._runs[run] = None
        tries = _Tries()
        try:
            if self._config.turns:
                await self.line.turn(run)
            while True:
                events = await self._next(run, tries)
                if not run.heard:
                    run.heard = True
                    self.line.moved(request.pool)  # its prompt is computed
                for event in events:
                    if isinstance(event, Finished):
                        run.ending = event.reason
                        self.stats.finished(event.usage, request.pool)
                        self._pool(run).outputs.ended(len(run.emitted))
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
            self.gate.leave(request, len(run.emitted))
            self.line.moved(request.pool)
            self.adapting.ended(run)
            self.retainer.send(run.over(self.retainer.reload_token_s(run.warm)))
            self.bills.ended(request.step, clock.now_s())

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
                at, _ = attempt.placement.waits_at or (attempt.placement.decode, 0.0)
                left = Replaced(run.request.step, at.node, better.wait_s, better.cost_s)
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
        if isinstance(error, FINAL) or tries.failures >= attempts_max:
            raise error
        node = None
        if attempt is not None:
            node = attempt.placement.decode.node
            run.avoid.add(attempt.placement.decode)
        self.stats.steps_moved += 1
        self.retainer.send(StepMoved(run.key, Moved(run.request.step, node, error.code, len(run.emitted))))
        log.warning("an attempt failed", step=run.request.step, node=node, tokens=len(run.emitted), why=error)

    def _look(self, run: Run, *, places: bool) -> tuple[Match, Placement]:
        """What the stores have of its prompt, and where it would be placed now, or is."""
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
        self._pool(run)
        found = self.index.match(run.hashes)
        placement = self.pricing.price(run, found.runs, self._home(run), run.leaves, places=places)
        assert placement is not None
        return found, placement

    def _place(self, run: Run) -> Placement:
        found, placement = self._look(run, places=True)
        pool = self._pool(run)
        warm, stored_tokens = run.warm, found.blocks * run.block_tokens
        lives = warm is not None and Key(warm.node, warm.generation) in pool.seen_by(run).decodes.rows
        if run.placed(placement, self._home(run), stored_tokens, warm_lives=lives):
            self.adapting.placed(run, placement)
        if placement.computes is not None:
            self._predicted.add(run.request.step, run.hashes, [placement.computes], clock.now_s())
            if self._sweeping is None:
                self._sweeping = asyncio.get_running_loop().call_later(TTL_S, self._sweep)
        placed = self._placed(run, placement, stored_tokens)
        self.retainer.send(StepPlaced(run.key, placed, run.continues, run.takes(placement)))
        log.debug(
            "a step was placed",
            step=run.request.step,
            trace=run.request.trace,
            tokens=run.request.prompt_tokens + len(run.emitted),
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

    def _elsewhere(self, run: Run, worker: Key) -> Placement | None:
        """Where a step would be placed now if not by that worker; None if nowhere."""
        stored = self.index.match(run.hashes).runs
        placement = self.pricing.price(run, stored, self._home(run), run.leaves | {worker}, places=False)
        return None if placement is None or worker == placement.decode else placement

    def _front(self, pool: str) -> Books:
        return self.pricing.synced(self._named(pool).front, pool)

    def _needs(self, run: Run) -> Needs:
        _, placement = self._look(run, places=False)
        trace, pool = self.traces.get(run.key), self._pool(run)
        decodes, output = pool.front.decodes, round(pool.outputs.tokens)
        parent = None if trace is None or trace.parent is None else self.traces.get((run.key[0], trace.parent))
        services = [one.service for one in (trace, parent) if one is not None]
        given_s = [served_s(decodes, one.tokens_computed, one.tokens_decoded) for one in services]
        begins = trace is not None and trace.parent is None and trace.steps_count <= 1
        takes_s, decodes_s = placement.decode_work_s + placement.prefill_work_s, served_s(decodes, 0, output)
        return Needs(max(given_s, default=0.0), takes_s, decodes_s, begins)

    def _pool(self, run: Run) -> Pooled:
        return self._named(run.request.pool)

    def _named(self, name: str) -> Pooled:
        if name not in self.pools:
            self.pools[name] = Pooled(self._predicted, self._elsewhere)
        return self.pools[name]

    def _home(self, run: Run) -> NodeId | None:
        trace = self.traces.get(run.key)
        return trace.home if trace is not None else None

    def _placed(self, run: Run, placement: Placement, stored_tokens: int) -> Placed:
        warm, decodes = run.warm, self._pool(run).seen_by(run).decodes
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
            waited_s=run.waited_s,
        )

    def _attempt(self, run: Run, placement: Placement) -> Attempt:
        request, trace, pool = run.request, self.traces.get(run.key), self._pool(run)
        info = next(info for info in self.members.live("decode") if info.node == placement.decode.node)
        run.context_max = info.context_max
        parent = trace.parent if trace is not None else None
        replies = self._peers.stream(
            info.address,
            run.message(info, placement, parent, self.bills.allowance(request.step, info.node, placement.prefill)),
            idle_timeout_s=self._config.idle_timeout_s,
            context=CallContext(trace=request.trace, step=request.step),
        )
        tokens = request.prompt_tokens + len(run.emitted)
        sent = InFlight(pool.entered_by(run), placement, clock.now_s(), tokens)
        if self._config.policy == "cost" and not run.background and run.prompt_logprobs is None:
            pool.relief.enter(run, placement)
        return Attempt(run, placement, replies, sent, pool.relief, self.bills)

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
