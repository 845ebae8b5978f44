"""Getting blocks from whoever has them: if one holder fails, the others are asked, block by block.

What each failure of a holder costs:

* dead: nothing but the call that notices it, or less; the others are asked at once.
* frozen, or cut off: :data:`DELIVER_S` where another holder is known, the whole deadline where none is. It is left
  alone for a moment then, so that the next reads ask the others first.
* slow: as frozen if it is slower than that, and it may be asked again a moment later.
* restarted, or its copy gone or bad: an answer; the others are asked.

A block that nobody else has is a miss as soon as that is known. The reason of a miss is that of the holder asked first.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from kvstore.client.nodes import StoreNodes
from kvstore.client.reader import GetResult, Reader, Wanted
from kvstore.client.staging import Staging
from tracehaul.runtime import clock
from tracehaul.wire.ids import BlockHash, NodeId

DELIVER_S = 0.1
DELIVER_BYTES_S = 100e6
"""What a holder may take to deliver where others could: so long, and so fast."""
REMEMBERED_MAX = 65536
"""Blocks with several holders that are remembered."""

Look = Callable[[Sequence[BlockHash], Collection[NodeId], float], Awaitable[Mapping[NodeId, bytes]]]
"""Asks all nodes but some, within so many seconds, which of these they hold: a byte per block."""


class Holders:
    """Blocks that several nodes hold, as of the last look at each; the longest not looked at is forgotten first."""

    def __init__(self) -> None:
        self._holders: OrderedDict[BlockHash, tuple[NodeId, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def of(self, block_hash: BlockHash) -> tuple[NodeId, ...]:
        """Its holders if there are several; empty otherwise."""
        return self._holders.get(block_hash, ())

    def saw(self, hashes: Sequence[BlockHash], held: Mapping[NodeId, bytes]) -> None:
        """Take in a look at all nodes; one that did not answer has an empty ``held``."""
        flags = [(node, of) for node, of in held.items() if of]
        if len(flags) < 2:
            if self._holders:
                for block_hash in hashes:
                    self._holders.pop(block_hash, None)
            return
        for place, block_hash in enumerate(hashes):
            holders = tuple([node for node, of in flags if of[place]])
            if len(holders) > 1:
                self._holders[block_hash] = holders
                self._holders.move_to_end(block_hash)
            else:
                self._holders.pop(block_hash, None)
        while len(self._holders) > REMEMBERED_MAX:
            self._holders.popitem(last=False)


class Get:
    """One get: ``results`` are set per wanted block. ``look`` None: the look that named the nodes was just taken."""

    def __init__(
        self,
        nodes: StoreNodes,
        reader: Reader,
        staging: Staging,
        holders: Holders,
        look: Look | None,
        results: list[GetResult],
        deadline_s: float,
    ) -> None:
        self._nodes = nodes
        self._reader = reader
        self._staging = staging
        self._holders = holders
        self._look = look
        self._results = results
        self._deadline_s = deadline_s
        self.failed_over = 0
        """Blocks that came from another holder than the one asked first."""

    async def run(self, groups: Mapping[NodeId, Sequence[Wanted]]) -> None:
        """Get each group from its node, or what of it fails from others."""
        work = [self._group(node, wanted, ()) for node, wanted in groups.items()]
        if len(work) == 1:
            await work[0]  # no turn of the loop in between: what has landed is handed over at once
        else:
            await asyncio.gather(*work)

    async def _group(self, node: NodeId, wanted: Sequence[Wanted], tried: tuple[NodeId, ...]) -> None:
        tried = (*tried, node)
        known = len(self._holders) > 0
        replicated = [item for item in wanted if self._other(item.hash, tried) is not None] if known else []
        if not replicated:
            await self._attempt(node, wanted, tried, self._deadline_s)
            return
        patience_s = DELIVER_S + sum(item.buffer.nbytes for item in replicated) / DELIVER_BYTES_S
        until_s = min(self._deadline_s, clock.now_s() + patience_s)
        places = {item.place for item in replicated}
        only_here = [item for item in wanted if item.place not in places]
        await asyncio.gather(
            self._attempt(node, replicated, tried, until_s),
            *([self._attempt(node, only_here, tried, self._deadline_s)] if only_here else []),
        )

    async def _attempt(self, node: NodeId, wanted: Sequence[Wanted], tried: tuple[NodeId, ...], until_s: float) -> None:
        await self._reader.get_from(node, wanted, self._results, until_s)
        results = self._results
        missed = [item for item in wanted if not isinstance(results[item.place], int)]
        failed = [item for item in missed if self._may_be_elsewhere(item)]
        if not failed:
            return
        reasons: list[GetResult] = [self._results[item.place] for item in failed]
        groups = await self._others(failed, tried)
        await asyncio.gather(*(self._group(other, items, tried) for other, items in groups.items()))
        for item, reason in zip(failed, reasons, strict=True):
            if not isinstance(self._results[item.place], int):
                self._results[item.place] = reason
            elif len(tried) == 1:
                self.failed_over += 1

    def _may_be_elsewhere(self, item: Wanted) -> bool:
        if clock.now_s() >= self._deadline_s:
            return False
        if item.buffer.unsettled() is None:
            return True
        # A late transfer may still write there: land in other memory, if there is any, and let that one rest.
        spare = None if item.buffer.lent else self._staging.spare()
        if spare is None:
            return False
        item.buffer.trade(spare)
        self._staging.release([spare])
        return True

    async def _others(self, failed: Sequence[Wanted], tried: tuple[NodeId, ...]) -> dict[NodeId, list[Wanted]]:
        """Who to ask next for what."""
        groups: dict[NodeId, list[Wanted]] = {}
        unknown: list[Wanted] = []
        for item in failed:
            other = self._other(item.hash, tried)
            if other is not None:
                groups.setdefault(other, []).append(item)
            else:
                unknown.append(item)
        if self._look is None or not unknown or len(tried) > 1:  # once is enough
            return groups
        held = await self._look([item.hash for item in unknown], tried, self._deadline_s - clock.now_s())
        for place, item in enumerate(unknown):
            other = next((node for node, flags in held.items() if flags and flags[place]), None)
            if other is not None:
                groups.setdefault(other, []).append(item)
        return groups

    def _other(self, block_hash: BlockHash, tried: tuple[NodeId, ...]) -> NodeId | None:
        """Another live node that is known to hold it."""
        others = [node for node in self._holders.of(block_hash) if node not in tried]
        return next((node for node in others if self._nodes.find(node) is not None), None)
