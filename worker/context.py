"""One step's context on this worker: a sequence, what it holds, and where the rest of it comes from."""

import asyncio
from array import array
from dataclasses import dataclass

from kvstore.client.client import StoreClient
from kvstore.client.staging import StagingBuffer
from tracehaul.engine.base import Engine, SequenceId
from tracehaul.runtime import clock, deadline
from tracehaul.runtime.finish import finish
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.hashing import TOKEN_BYTES, KVLayout, tail_candidates, token_array
from tracehaul.wire.ids import BlockHash, NodeId
from worker.config import WorkerConfig
from worker.meter import Account
from worker.pressure import Arrival

Fetched = tuple[list[StagingBuffer], list[int | None]]
"""Staging buffers, and the bytes that landed in each (None: a miss)."""


@dataclass
class PullStats:
    """What pulls brought in for one step."""

    tokens: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    missed_blocks: int = 0


class Context:
    """KV of a growing run of tokens, being assembled.

    ``sequence`` holds KV for the first :attr:`length` tokens of ``tokens``; hashes cover all full blocks of them.
    """

    def __init__(
        self,
        engine: Engine,
        client: StoreClient,
        config: WorkerConfig,
        *,
        arrival: Arrival,
        came_s: float,
        deadline_s: float | None,
        salt: str,
        packed: bytes,
        hashes: list[BlockHash],
        sequence: SequenceId,
        resident_tokens: int,
    ) -> None:
        self._engine = engine
        self._client = client
        self._config = config
        self.arrival = arrival
        """Its step's place among those of this worker."""
        self.came_s = came_s
        """When its step counts as having come: the first of its family did."""
        self.deadline_s = deadline_s
        """When its step's waits end; None: never."""
        self.salt = salt
        self.tokens: array[int] = token_array(packed)
        """Grows with the output."""
        self.packed = packed
        """What it began with, as it came."""
        self.sequence = sequence
        self.resident_tokens = resident_tokens
        """What it held when it was opened."""
        self.root = self.layout.root(salt)
        self.hashes = hashes
        self.holders: list[NodeId | None] = [None] * len(self.hashes)
        """Which store node holds each block, as of the last look."""
        self.pulled = PullStats()
        self.account: Account | None = None
        """Who is charged for what moves; None: nobody."""
        self.copying = asyncio.Lock()
        """Held while its sequence is copied out: it must not grow meanwhile."""

    @property
    def layout(self) -> KVLayout:
        """How its blocks are cut and packed."""
        return self._engine.info.layout

    @property
    def length(self) -> int:
        """Tokens whose KV is here."""
        return self._engine.length(self.sequence)

    def forget(self) -> None:
        """Give up what was resident: all of it will be computed."""
        self._engine.truncate(self.sequence, 0)
        self.resident_tokens = 0

    async def locate(self, until: int | None = None) -> None:
        """Ask the store what it holds: of all blocks, or of the first ``until`` tokens where it was not known.

        Raises:
            DeadlineExceeded: its step's deadline has passed.
        """
        last = len(self.hashes) if until is None else min(until // self.layout.block_tokens, len(self.hashes))
        first = self.stored_tokens() // self.layout.block_tokens if until is not None else 0
        if first < last:
            async with deadline.until(self.deadline_s):
                self.holders[first:last] = await self._client.exists(self.hashes[first:last])

    def stored_tokens(self) -> int:
        """Length of the leading run that the store holds, in tokens, tails not counted."""
        blocks = next((i for i, holder in enumerate(self.holders) if holder is None), len(self.holders))
        return blocks * self.layout.block_tokens

    async def pull(self, until: int) -> None:
        """Bring the context from the store up to at most ``until`` tokens, as far as it has them.

        A block that does not arrive, or arrives wrong, ends the pull: what is missing is computed.

        Raises:
            DeadlineExceeded: its step's deadline has passed.
        """
        before = self.length
        if before >= until:
            return
        started_s = clock.now_s()
        block_tokens = self.layout.block_tokens
        last = min(self.stored_tokens(), until + block_tokens - 1) // block_tokens
        async with deadline.until(self.deadline_s):
            if last * block_tokens > before:
                await self._pull_blocks(before // block_tokens, last)
            if self.length < until:
                await self._pull_tail(until)
        if self.length > until:
            self._engine.truncate(self.sequence, until)
        self.pulled.tokens += self.length - before
        self.pulled.seconds += clock.now_s() - started_s

    async def _pull_blocks(self, first: int, last: int) -> None:
        """Pull full blocks ``[first, last)``: the next group travels while one is unpacked."""
        block_tokens = self.layout.block_tokens
        groups = [
            range(start, min(start + self._config.group_blocks, last))
            for start in range(first, last, self._config.group_blocks)
        ]
        pending: asyncio.Future[Fetched] | None = asyncio.ensure_future(self._fetch_blocks(groups[0]))
        try:
            for index, group in enumerate(groups):
                assert pending is not None
                buffers, sizes = await pending
                pending = None
                try:
                    landed = next((i for i, size in enumerate(sizes) if size != self.layout.block_bytes), len(group))
                    if landed == len(group) and index + 1 < len(groups):
                        pending = asyncio.ensure_future(self._fetch_blocks(groups[index + 1]))
                    if landed:
                        await self._append(group.start, buffers[:landed])
                finally:
                    self._client.staging.release(buffers)
                if pending is None:
                    self.pulled.missed_blocks += max(0, last - self.length // block_tokens)
                    return
        finally:
            if pending is not None:
                await self._discard(pending)

    async def _append(self, block: int, buffers: list[StagingBuffer]) -> None:
        """Unpack full blocks from index ``block`` on; a partial block that was there gives way."""
        start = block * self.layout.block_tokens
        self._engine.truncate(self.sequence, start)
        views = [buffer.view(self.layout.block_bytes) for buffer in buffers]
        await finish(self._engine.unpack(self.sequence, start, len(views) * self.layout.block_tokens, views))
        self._landed(len(views) * self.layout.block_bytes)

    def _landed(self, nbytes: int) -> None:
        self.pulled.nbytes += nbytes
        if self.account is not None:
            self.account.moved_bytes += nbytes

    async def _pull_tail(self, until: int) -> None:
        """Pull the longest partial block that continues the full ones, if it adds anything."""
        block_tokens = self.layout.block_tokens
        base = self.length // block_tokens
        have = self.length - base * block_tokens
        parent = self.hashes[base - 1] if base else self.root
        following = self.packed[base * block_tokens * TOKEN_BYTES : until * TOKEN_BYTES]
        candidates = tail_candidates(parent, following, block_tokens)[have:]
        if not candidates:
            return
        holders = await self._client.exists(candidates)
        found = next((i for i in reversed(range(len(candidates))) if holders[i] is not None), None)
        if found is None:
            return
        count = have + found + 1
        buffers, sizes = await self._fetch([candidates[found]], [holders[found]])
        try:
            nbytes = count * self.layout.token_bytes
            if sizes[0] != nbytes:
                self.pulled.missed_blocks += 1
                return
            self._engine.truncate(self.sequence, base * block_tokens)
            await finish(self._engine.unpack(self.sequence, base * block_tokens, count, [buffers[0].view(nbytes)]))
            self._landed(nbytes)
        finally:
            self._client.staging.release(buffers)

    async def _fetch_blocks(self, blocks: range) -> Fetched:
        return await self._fetch(self.hashes[blocks.start : blocks.stop], self.holders[blocks.start : blocks.stop])

    async def _fetch(self, hashes: list[BlockHash], holders: list[NodeId | None]) -> Fetched:
        """Where there is no room to land in, everything is a miss: computing beats waiting."""
        try:
            buffers = await self._client.staging.acquire(len(hashes), timeout_s=self._config.store_timeout_s)
        except ClusterError:
            return [], [None] * len(hashes)
        try:
            return buffers, await self._client.get(hashes, buffers, self._config.store_timeout_s, holders)
        except BaseException:
            self._client.staging.release(buffers)
            raise

    async def _discard(self, fetch: "asyncio.Future[Fetched]") -> None:
        """End a fetch nobody waits for any more; give its buffers back if it had landed them."""
        fetch.cancel()
        try:
            buffers, _ = await fetch
        except (asyncio.CancelledError, ClusterError):
            return
        self._client.staging.release(buffers)
