"""Publishes a sequence's blocks as they fill, and its tail at the end."""

import asyncio
from collections.abc import Callable
from typing import Self

from kvstore.client.client import OutgoingBlock, StoreClient
from tracehaul.engine.base import Engine
from tracehaul.runtime.finish import finish
from tracehaul.runtime.log import Log
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.hashing import next_hash
from tracehaul.wire.ids import BlockHash, NodeId
from worker.config import WorkerConfig
from worker.context import Context

log = Log(__name__)


class BlockWriter:
    """Writes one context back to the store, beside its computation; an async context manager.

    Blocks of ``context.tokens``, which grows with the output, go to ``home``. A block that the store held at the start
    is not written again; one that it refused or lost ends the writing, since what follows a hole can never be pulled.
    """

    def __init__(
        self,
        engine: Engine,
        client: StoreClient,
        config: WorkerConfig,
        context: Context,
        home: NodeId | None,
        on_published: Callable[[int], None] | None = None,
        on_ended: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._client = client
        self._config = config
        self._layout = context.layout
        self._sequence = context.sequence
        self._tokens = context.tokens
        self._copying = context.copying
        self._account = context.account
        self._root = context.root
        self._tenant = context.salt
        self._hashes = list(context.hashes)
        self._held = [holder is not None for holder in context.holders]
        self._home = home
        self._on_published = on_published
        self._on_ended = on_ended
        self._computed = context.length
        self._next_block = 0
        self._closing = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.published_tokens = 0
        """Leading tokens that can be pulled from the store."""
        self.refused = ""
        """Why writing ended early, as the store client's outcome; empty if it did not."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=f"write {self._sequence}")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Write no more. After it the writer no longer touches the sequence."""
        assert self._task is not None
        self._task.cancel()
        await finish(asyncio.wait([self._task]))

    def computed(self, length: int, *, last: bool = False) -> None:
        """KV of the first ``length`` tokens is in place and will not change; after ``last`` there will be no more."""
        self._computed = max(self._computed, length)
        self._closing = self._closing or last
        self._wake.set()

    async def finish(self) -> None:
        """Write what is left, the partial tail included."""
        assert self._task is not None
        self._closing = True
        self._wake.set()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        size = self._layout.block_tokens
        try:
            while not self.refused:
                ready = self._computed if self._closing else self._computed // size * size
                if self._next_block * size < ready:
                    await self._write_group(ready)
                elif self._closing:
                    break
                else:
                    self._wake.clear()
                    await self._wake.wait()
        except ClusterError as error:
            self.refused = error.code
        except Exception as error:
            log.error("write-back failed", error=error, sequence=self._sequence)
            self.refused = "internal"
        if self.refused:
            log.warning("write-back ended", sequence=self._sequence, block=self._next_block, reason=self.refused)
        if self._on_ended is not None:
            self._on_ended()

    def _hash_of(self, block: int) -> BlockHash:
        """The chain goes on over output tokens as their blocks fill."""
        size = self._layout.block_tokens
        while len(self._hashes) <= block:
            index = len(self._hashes)
            parent = self._hashes[-1] if self._hashes else self._root
            self._hashes.append(next_hash(parent, self._tokens[index * size : (index + 1) * size].tobytes()))
        return self._hashes[block]

    async def _write_group(self, ready: int) -> None:
        """Write the next run of blocks that the store lacks, at most one group of them, up to ``ready`` tokens."""
        size = self._layout.block_tokens
        first, last = self._next_block, -(-ready // size)
        while first < last and self._is_held(first):
            first += 1
        end = first
        while end < last and end - first < self._config.group_blocks and not self._is_held(end):
            end += 1
        tokens = min(end * size, ready)
        if end > first and not await self._put(first, tokens - first * size):
            return
        self._next_block = end
        self._progress(tokens)

    def _is_held(self, block: int) -> bool:
        return block < len(self._held) and self._held[block]

    async def _put(self, block: int, tokens: int) -> bool:
        """Write ``tokens`` tokens from block index ``block`` on; False if the store did not take all of them."""
        size = self._layout.block_tokens
        counts = [min(size, tokens - start) for start in range(0, tokens, size)]
        buffers = await self._client.staging.acquire(len(counts), timeout_s=self._config.store_timeout_s)
        try:
            views = [
                buffer.view(count * self._layout.token_bytes) for buffer, count in zip(buffers, counts, strict=True)
            ]
            async with self._copying:
                await finish(self._engine.pack(self._sequence, block * size, tokens, views))
            outgoing: list[OutgoingBlock] = []
            for index, (buffer, count) in enumerate(zip(buffers, counts, strict=True)):
                parent = self._hash_of(block + index - 1) if block + index else self._root
                if count == size:
                    own = self._hash_of(block + index)
                else:
                    start = (block + index) * size
                    own = next_hash(parent, self._tokens[start : start + count].tobytes())
                outgoing.append(OutgoingBlock(own, parent, buffer, count * self._layout.token_bytes))
            timeout_s = self._config.store_timeout_s
            outcomes = await self._client.put(self._home, outgoing, timeout_s, self._tenant)
            if self._account is not None:
                published = zip(outgoing, outcomes, strict=True)
                self._account.moved_bytes += sum(one.nbytes for one, how in published if how == "published")
        finally:
            self._client.staging.release(buffers)
        self.refused = next(
            (outcome for outcome in outcomes if outcome not in ("published", "present", "in_flight")), ""
        )
        return not self.refused

    def _progress(self, tokens: int) -> None:
        self.published_tokens = tokens
        if self._on_published is not None:
            self._on_published(tokens)
