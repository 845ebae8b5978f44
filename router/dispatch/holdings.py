"""What stores hold of traces, charged to them: looked at now and then, as nobody counts for whom a block lies there."""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence

from router.dispatch.bills import Bills
from router.fleet.index import Index, TierRun
from router.fleet.members import MemberRegistry
from router.traces.contexts import listed
from router.traces.machine import Traces
from router.traces.trace import Trace, TraceKey
from tracehaul.runtime import clock
from tracehaul.wire.ids import BlockHash, NodeId
from tracehaul.wire.spent import Spent

BLOCKS_MAX = 200_000
"""Looked at in one go, whoever's: those of the other traces are next time."""
TURN_BLOCKS = 5000
"""Then others have a turn: a millisecond or two."""


class Holdings:
    """One router's."""

    def __init__(self, traces: Traces, index: Index, members: MemberRegistry, bills: Bills) -> None:
        self._traces = traces
        self._index = index
        self._members = members
        self._bills = bills
        self._looked_s: dict[TraceKey, float] = {}
        """When each trace was looked at last; those that were not for longest come first."""

    async def look(self) -> None:
        """Charge traces for what is held of their last contexts, since it was looked at last. A block of several of
        them is shared."""
        alive = {trace.key: trace for trace in self._traces.all() if trace.lefts and self._bills.mine(trace.key)}
        known = {key: at_s for key, at_s in self._looked_s.items() if key in alive}
        now_s = clock.now_s()
        self._looked_s = known | {key: now_s for key in alive if key not in known}
        held: list[tuple[Trace, Sequence[BlockHash], Sequence[TierRun]]] = []
        sharers: Counter[BlockHash] = Counter()
        blocks, turn, token_bytes = 0, 0, self._token_bytes()
        for key in known:
            hashes = listed(alive[key].lefts[-1].hashes)
            found = self._index.match(hashes)
            held.append((alive[key], hashes[: found.blocks], found.runs))
            sharers.update(hashes[: found.blocks])
            blocks += len(hashes)
            if blocks > BLOCKS_MAX:
                break
            if blocks - turn > TURN_BLOCKS:
                turn = blocks
                await asyncio.sleep(0)
        turn = 0
        for trace, hashes, runs in held:
            turn += len(hashes)
            since_s = self._looked_s.pop(trace.key, now_s)
            self._looked_s[trace.key] = now_s
            block_bytes = token_bytes.get(trace.worker, 0.0) * trace.lefts[-1].block_tokens
            memory, below = _shares(hashes, runs, sharers)
            spent = (now_s - since_s) * block_bytes
            if memory + below > 0 and spent > 0:
                kept = Spent(memory_byte_s=memory * spent, disk_byte_s=below * spent)
                self._bills.keeps(trace.key, self._bills.prices.bill(None, kept))
            if turn > TURN_BLOCKS:
                turn = 0
                await asyncio.sleep(0)

    def _token_bytes(self) -> Mapping[NodeId | None, float]:
        """Of KV, as each worker has it."""
        return {
            info.node: self._members.load(info.node).bytes_max / info.limits.kv_tokens_max
            for info in self._members.infos()
            if info.limits.kv_tokens_max
        }


def _shares(hashes: Sequence[BlockHash], runs: Sequence[TierRun], sharers: Counter[BlockHash]) -> tuple[float, float]:
    """Blocks in memory and below it that are one trace's."""
    blocks, at = [0.0, 0.0], 0
    for run in runs:
        blocks[run.tier > 0] += sum(1 / sharers[block] for block in hashes[at : run.end])
        at = run.end
    return blocks[0], blocks[1]
