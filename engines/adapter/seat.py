"""A worker over a stock server, as a :class:`worker.seat.Seat`."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec
from blake3 import blake3

from engines.adapter.books import Books
from engines.adapter.config import AdapterConfig
from engines.adapter.decoding import DecodeAdapter
from engines.adapter.dialect import Dialect, Facts
from engines.adapter.generating import DUE_AFTER, Generating
from engines.adapter.prefilling import PrefillAdapter
from engines.adapter.server import StockServer
from engines.adapter.stored import Stored
from engines.adapter.thinking import UNMARKED, Marks
from engines.adapter.watch import ServerLost, Watch
from tracehaul.rpc.base import Service
from tracehaul.rpc.member import Member
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.wire.cluster import Feature, Lack, Members, NodeInfo, NodeLoad, WorkerLimits
from tracehaul.wire.hashing import HASH_BYTES, KVLayout
from tracehaul.wire.ids import BlockHash
from tracehaul.wire.spent import Charge
from worker.config import WorkerConfig
from worker.seat import member_of

log = Log(__name__)

FEATURES: tuple[Feature, ...] = ("constraints", "prompt_logprobs")
LACKS: tuple[Lack, ...] = ("seeds", "penalties", "constraints", "tails", "chunks", "suspension")
UNSHARED_BLOCK_TOKENS = 32
"""Of a server that shares none: by these its router compares prompts all the same."""
_NAMESPACE = b"tracehaul/stock|"
"""No layout's root begins with that."""


def root_of(dialect: Dialect, facts: Facts, layout: KVLayout | None) -> BlockHash:
    """What a worker announces: its layout's root, or where it shares no blocks, what only its like have."""
    if layout is not None:
        return layout.root()
    own = f"{dialect.name}|{facts.model}|{facts.path}".encode()
    return BlockHash(blake3(_NAMESPACE + own).digest(HASH_BYTES))


class StockSeat:
    """One worker over ``server``, which has said what it is: ``facts``.

    Args:
        node: who it is and where it listens; what the server says of itself is added.
        server: where steps are computed; closed with the seat.
        dialect: how it is spoken to.
        facts: what it is.
        layout: of the blocks that its plugin shares; None: it has none, and shares nothing.
        peers: connections to the other nodes.
        limits: as of every worker.
        config: bounds of the waits for the server.
        marks: the model's tokens around its reasoning, as far as its files are here.
        ends: the server was started by this worker, and lost for long it takes the worker with it.
    """

    def __init__(
        self,
        node: NodeInfo,
        server: StockServer,
        dialect: Dialect,
        facts: Facts,
        layout: KVLayout | None,
        peers: Peers,
        limits: WorkerConfig,
        config: AdapterConfig,
        *,
        marks: Marks = UNMARKED,
        ends: bool = False,
    ) -> None:
        self._node = node
        self._server = server
        self._dialect = dialect
        self._facts = facts
        self._layout = layout
        self._config = config
        self._ends = ends
        self.watch = Watch(server, dialect, facts, config, self._lost)
        generating = Generating(server, dialect, facts, self.watch, config)
        stored = Stored(peers, layout if limits.use_store else None)
        self.books = Books(root_of(dialect, facts, layout), generating, stored, limits, marks)
        self._decode = DecodeAdapter(self.books, peers)
        self._service: Service = self._decode
        if node.role == "prefill":
            self._service = PrefillAdapter(self.books, config.stored_timeout_s)
        if not facts.version.startswith(tuple(dialect.tested)):
            tested = " or ".join(dialect.tested)
            log.warning("a version that was not tried", engine=dialect.name, version=facts.version, tested=tested)

    @property
    def member(self) -> Member:
        """What it brings into the fleet."""
        return member_of(self)

    @property
    def info(self) -> NodeInfo:
        facts, limits, decodes = self._facts, self.books.limits, self._node.role == "decode"
        # What shares nothing gains nothing by a prefill worker: no helper is priced for it.
        local_tokens = limits.local_prefill_tokens if self.books.stored.shares else facts.context_max
        return msgspec.structs.replace(
            self._node,
            model=self._node.model or facts.model,
            root=self.books.root,
            block_tokens=UNSHARED_BLOCK_TOKENS if self._layout is None else self._layout.block_tokens,
            hashing="" if self._layout is None else self._layout.hashing,
            context_max=facts.context_max,
            engine=self._dialect.name,
            features=FEATURES if decodes else (),
            lacks=LACKS,
            limits=WorkerLimits(
                kv_tokens_max=facts.kv_tokens_max,
                sequences_max=facts.sequences_max or limits.sequences_max,
                waiting_max=limits.waiting_max,
                chunk_tokens=limits.chunk_tokens,
                local_prefill_tokens=local_tokens if decodes else 0,
                stretch=DUE_AFTER,
            ),
            rates=self.watch.pace.rates,
        )

    @property
    def service(self) -> Service:
        return self._service

    @property
    def background(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        return self.watch.run, self._run

    @property
    def stats(self) -> Mapping[str, msgspec.Struct]:
        return {"adapter": self.books.stats}

    def load(self) -> NodeLoad:
        figures, facts, now_s = self.watch.figures, self._facts, clock.now_s()
        self.books.sharing.settle(now_s)
        meter = self.books.meter
        token_bytes = 0 if self._layout is None else self._layout.token_bytes
        return NodeLoad(
            running=self.books.running,
            waiting=figures.waiting,
            bytes_used=figures.used_tokens * token_bytes,
            bytes_max=facts.kv_tokens_max * token_bytes,
            **self.watch.pace.rates._asdict(),
            free_tokens=max(0, facts.kv_tokens_max - figures.used_tokens),
            serving=not self.watch.fault,
            fault=self.watch.fault,
            up_s=meter.up_s(now_s),
            busy_s=meter.busy_s,
            charges=meter.charges(now_s),
            orphans=self._decode.taking_over.names(),
        )

    def history(self) -> tuple[Charge, ...]:
        return self.books.meter.history(clock.now_s())

    def set_members(self, members: Members) -> None:
        self._decode.set_members(members)
        self.books.stored.set_members(members)

    async def served(self) -> None:
        """It has said what it is."""

    async def news(self) -> None:
        await self._decode.taking_over.news()

    async def aclose(self) -> None:
        await self.books.generating.aclose()
        await self.books.stored.aclose()
        await self._server.aclose()

    def _lost(self) -> None:
        self.books.stats.servers_lost += 1
        self.books.ran.clear()

    async def _run(self) -> None:
        """Until the server is lost for good, if it is this worker's own."""
        while not (self._ends and self.watch.down_s > self._config.down_timeout_s):  # noqa: ASYNC110 - time passes
            await asyncio.sleep(self._config.poll_s)
        raise ServerLost(self.watch.fault)
