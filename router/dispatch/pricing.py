"""Puts what is known of a step and of the fleet before the policy."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

from router.dispatch.pooled import Books, Pooled
from router.dispatch.predicted import Predicted
from router.dispatch.run import Run
from router.fleet.index import TierRun
from router.fleet.load import Key
from router.fleet.members import MemberRegistry
from router.policy.cost import StoredRun
from router.policy.feasible import unable
from router.policy.hindsight import Priced, priced
from router.policy.placement import Ask, Placement, Policy, place
from router.traces.trace import TraceKey
from tracehaul.runtime import clock
from tracehaul.wire.ids import NodeId


class Pricing:
    """One router's. ``pools``: of those that had a step, by name."""

    def __init__(
        self,
        policy: Policy,
        members: MemberRegistry,
        predicted: Predicted,
        pools: Mapping[str, Pooled],
        *,
        stores: bool,
    ) -> None:
        self.told: Callable[[TraceKey, Priced], None] | None = None
        """Told of each decision, with all that it was based on."""
        self._policy: Policy = policy
        self._members = members
        self._predicted = predicted
        self._pools = pools
        self._stores = stores
        self._turn = 0

    def price(
        self, run: Run, stored: Sequence[TierRun], home: NodeId | None, leaves: set[Key], *, places: bool = True
    ) -> Placement | None:
        """Where a step would run now, if not with those prefill workers; None if nowhere. ``places``: it will."""
        pool, now_s, members = self._pools[run.request.pool], clock.now_s(), self._members
        books = self.synced(pool.seen_by(run), run.request.pool)
        decodes = members.live("decode", run.request.pool)
        loads = members.loads(decodes)
        expected = self._predicted.match(run.request.step, run.hashes, now_s)
        ask = Ask(
            trace=run.request.trace,
            prompt_tokens=run.request.prompt_tokens + len(run.emitted),
            stored=self._stored(stored, run.block_tokens),
            warm=run.warm,
            home=home,
            predicted={node: blocks * run.block_tokens for node, blocks in expected.items()},
            avoided=frozenset(run.avoid),
            unable=unable(decodes, run.needs),
            left=frozenset(leaves),
            begun=next((i.node for i, load in zip(decodes, loads, strict=True) if run.begun_by(load)), None),
            asked=run.request.decode,
            turn=self._turn,
            output_tokens=pool.outputs.tokens,
        )
        stores = [info.node for info in members.live("store")] if self._stores else []
        placement = place(self._policy, ask, books.decodes, books.prefills, stores, now_s, pool.knobs)
        if places and placement is not None:
            self._turn += 1
            if self.told is not None:
                based = (self._policy, books.decodes, books.prefills, stores, now_s, placement, pool.knobs)
                self.told(run.key, priced(run.request.step, ask, *based, run.request.pool))
        return placement

    def synced(self, books: Books, pool: str) -> Books:
        """With what that pool's workers said last."""
        for role, fleet in (("decode", books.decodes), ("prefill", books.prefills)):
            workers = self._members.live(role, pool)
            fleet.sync(workers, self._members.loads(workers))
        return books

    def _stored(self, runs: Sequence[TierRun], block_tokens: int) -> list[StoredRun]:
        """With what it takes to bring each up: on the slowest node, as it may be on any."""
        if all(run.tier == 0 for run in runs):
            return [StoredRun(run.end * block_tokens, 0.0) for run in runs]
        block_s = [0.0]
        for load in self._members.loads(self._members.live("store")):
            below = [0.0, *(seconds for seconds in (load.disk_block_s, load.s3_block_s) if seconds)]
            block_s = [max(pair) for pair in zip_longest(block_s, below, fillvalue=0.0)]
        depth = len(block_s) - 1
        return [StoredRun(run.end * block_tokens, block_s[min(run.tier, depth)] / block_tokens) for run in runs]
