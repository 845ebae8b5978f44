"""The scheduler's part: which blocks the store has, which are to be loaded, and which a step has filled."""

import concurrent.futures
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engines.blocks.store import LATE_S, EngineStore
from engines.vllm.chains import Chain, Move, leading, of_rank
from tracehaul.wire.ids import BlockHash

GLANCE_S = 0.02
"""The longest that a step waits for looks at the stores, all of them together; what is not answered by then is asked
about again at the next step, which may be a long one."""
KEPT_S = 0.25
"""How long an answer is good for: a request that finds no room asks at each step."""


@dataclass
class _Look:
    """At the blocks of one request, for each rank."""

    futures: "list[concurrent.futures.Future[int] | None]"
    until_s: float


class Scheduling:
    """Of one engine, on its scheduler's thread."""

    def __init__(self, block_tokens: int, timeout_s: float, *, reads: bool, later: bool = True) -> None:
        """``later``: a request waits for its loads while others run, and not the step that it is in."""
        self._tokens = block_tokens
        self._timeout_s = timeout_s
        self._reads = reads
        self._later = later
        self._store: EngineStore | None = None
        self._roots: list[BlockHash] = []
        self._chains: dict[str, Chain] = {}
        self._looks: dict[str, _Look] = {}
        self._loads: list[tuple[Chain, Move]] = []
        self._loading: list[Chain] = []
        """Those that the last step had loads of, finished since or not."""
        self._glance_s = GLANCE_S
        """What is left of it to this step."""

    def joined(self, store: EngineStore, roots: Sequence[BlockHash]) -> None:
        """The store to ask, and the root of each rank's blocks."""
        self._store = store
        self._roots = list(dict.fromkeys(roots))

    def matched(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """See the connector's ``get_num_new_matched_tokens``."""
        if self._store is None:
            return 0, False
        chain = self._chain(request)
        first = chain.first = computed_tokens // self._tokens
        last = chain.upto((request.num_tokens - 1) // self._tokens)  # one token at least is computed here
        if not self._later and self._loads_any(chain.keys[:first]):
            return None, False  # vLLM takes them for computed, and they may not come: a step later that is known
        if chain.looked is None or self._store.now_s() > chain.looked_s + KEPT_S:
            chain.looked, chain.looked_s = self._look(request.request_id, chain, last), self._store.now_s()
        if chain.looked is None:
            return None, False
        found, known = chain.looked
        found = min(found, last)
        # What the engine has itself and the store does not, or does no more, is saved again.
        chain.saved = min(first, found) if known else first
        more = max(0, found - first) if self._reads else 0
        return more * self._tokens, more > 0 and self._later

    def allocated(self, request: Any, block_ids: list[int], external_tokens: int) -> None:
        """See the connector's ``update_state_after_alloc``."""
        if self._store is None:
            return
        chain = self._chain(request)
        chain.block_ids = block_ids
        if external_tokens:
            end = chain.first + external_tokens // self._tokens
            self._loads.append((chain, chain.move(chain.first, end)))
            chain.saved = end if chain.saved == chain.first else chain.saved

    def step(self, scheduled: Any, *, saving: bool) -> tuple[list[Move], list[Move]]:
        """What is loaded, and saved, with the step that this output of the scheduler is."""
        loads = [move for _, move in self._loads]
        self._loading, self._loads = [chain for chain, _ in self._loads], []
        self._glance_s = GLANCE_S
        cached = scheduled.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            chain = self._chains.get(request_id)
            if chain is not None and new is not None:
                resumed = request_id in cached.resumed_req_ids
                chain.block_ids = list(new[0]) if resumed else [*chain.block_ids, *new[0]]
        computed |= {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        saves: list[Move] = []
        for request_id, tokens in scheduled.num_scheduled_tokens.items() if saving else ():
            chain = self._chains.get(request_id)
            if chain is None:
                continue
            end = chain.upto((computed[request_id] + tokens) // self._tokens)
            if end > chain.saved:
                saves.append(chain.move(chain.saved, end))
                chain.saved = end
        return loads, saves

    def failed(self, block_ids: set[int]) -> set[int]:
        """These were not loaded: what is computed instead is saved anew. Blocks that are not what vLLM takes them for:
        those and what follows them in a request."""
        wrong: set[int] = set()
        for chain in (*self._chains.values(), *self._loading):
            at = next((at for at, block in enumerate(chain.block_ids) if block in block_ids), None)
            if at is not None:
                chain.saved = min(chain.saved, at)
                wrong.update(chain.block_ids[at:])
        return wrong

    def finished(self, request_id: str) -> None:
        """Nothing more comes of it."""
        self._chains.pop(request_id, None)
        self._looks.pop(request_id, None)

    def _chain(self, request: Any) -> Chain:
        chain = self._chains.get(request.request_id)
        if chain is None:
            chain = self._chains[request.request_id] = Chain(request, self._tokens, self._roots[0])
        return chain

    def _loads_any(self, keys: list[BlockHash]) -> bool:
        """Whether the step that is being scheduled loads one of these."""
        return any(not set(move.keys).isdisjoint(keys) for _, move in self._loads)

    def _look(self, request_id: str, chain: Chain, last: int) -> tuple[int, bool] | None:
        """Leading blocks that all ranks' stores have, and whether that is known; None while they are asked."""
        look = self._looks.get(request_id)
        if self._store is None:
            return 0, False
        if look is None:
            if not self._store.ready or not last:
                return 0, False
            first, keys = self._roots[0], chain.keys[:last]
            futures = [self._store.looking([of_rank(root, first, key) for key in keys]) for root in self._roots]
            look = self._looks[request_id] = _Look(futures, self._store.now_s() + self._timeout_s + LATE_S)
        asked = [future for future in look.futures if future is not None]
        began_s = self._store.now_s()
        _, pending = concurrent.futures.wait(asked, self._glance_s)
        now_s = self._store.now_s()
        self._glance_s = max(0.0, self._glance_s - (now_s - began_s))
        if pending and now_s < look.until_s:
            return None
        del self._looks[request_id]
        failed = pending or len(asked) < len(look.futures) or any(_failed(future) for future in asked)
        return (0, False) if failed else (leading([future.result() for future in asked]), True)


def fresh(scheduled: Any, loads: Sequence[Move], block_tokens: int) -> list[int]:
    """Blocks that the step of this scheduler's output, with these loads, writes to from their beginning on: those that
    it gave out, but for what the engine had in them already."""
    blocks = [block for move in loads for block in move.block_ids]
    for new in scheduled.scheduled_new_reqs:
        blocks += new.block_ids[0][new.num_computed_tokens // block_tokens :]
    cached = scheduled.scheduled_cached_reqs
    for request_id, new_ids, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if new_ids is not None:
            blocks += new_ids[0][computed // block_tokens if request_id in cached.resumed_req_ids else 0 :]
    return blocks


def _failed(future: "concurrent.futures.Future[int]") -> bool:
    return future.cancelled() or future.exception() is not None
