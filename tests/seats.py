"""Seats of every kind over one in-process network with one store node, for tests."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from decode.worker import DecodeService
from engines.adapter.config import AdapterConfig
from engines.adapter.dialect import Dialect
from engines.adapter.seat import StockSeat
from engines.adapter.server import StockServer
from engines.adapter.watch import known
from engines.sglang.adapter import SGLang
from engines.vllm.adapter import VLLM
from kvstore.client.client import StoreClient
from kvstore.client.staging import Staging
from kvstore.config import StoreConfig
from kvstore.node.assemble import assemble_store
from prefill.worker import PrefillService
from sim.links import SimMemory
from tests.stock import MODEL, Listening, StockEngine
from tests.stock_sglang import SGLangServer
from tests.stock_vllm import VLLMServer
from tracehaul.engine.fake import EngineCost, FakeEngine, fake_info
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.peers import Peers
from tracehaul.runtime.offload import InlineOffload
from tracehaul.transfer.local import LocalHub, LocalTransfer
from tracehaul.transfer.plane import Plane
from tracehaul.wire.cluster import Members, NodeInfo, Role
from tracehaul.wire.hashing import pack_tokens, unpack_tokens
from tracehaul.wire.ids import BlockHash, Generation, NodeId, StepId, TraceId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import DecodeStep, Sampling, StepDone, StepUsage, TokenLogprobs, Tokens
from worker.assemble import assemble_worker
from worker.config import WorkerConfig
from worker.seat import Seat

OFFLOAD = InlineOffload()
INFO = fake_info()
SLOT = 8192
G = Generation(1)
PATIENT = AdapterConfig(poll_s=0.05)
QUICK = AdapterConfig(poll_s=0.05, answer_timeout_s=0.5, stall_timeout_s=1.0, silence_timeout_s=0.5)
"""Takes a server for lost as soon as a busy machine allows."""
LIMITS = WorkerConfig(local_prefill_tokens=32, staging_blocks=16)
LIMIT_S = 30.0
KINDS = ("native", "sglang", "sglang cumulative", "vllm")
STOCK = KINDS[1:]


class Sat:
    """A seat that serves."""

    def __init__(self, seat: Seat, address: str, engine: StockEngine | None, listening: Listening | None) -> None:
        self.seat = seat
        self.address = address
        self._engine = engine
        self.listening = listening
        self.tasks = [asyncio.create_task(work()) for work in seat.background]

    @property
    def engine(self) -> StockEngine:
        assert self._engine is not None
        return self._engine


class Told:
    """What came of a step."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.scores: list[TokenLogprobs] = []
        self.usages: list[StepUsage] = []
        self.messages = 0
        self.done: StepDone | None = None

    @property
    def end(self) -> StepDone:
        assert self.done is not None
        return self.done

    def take(self, reply: Reply) -> None:
        assert self.done is None, "nothing follows the terminal message"
        self.messages += 1
        match reply:
            case Tokens(ids, usage, logprobs, scores):
                self.tokens += unpack_tokens(ids)
                self.logprobs += logprobs or ()
                self.scores += scores
                self.usages += [usage] if usage is not None else []
            case StepDone():
                self.done = reply
            case _:
                raise AssertionError(reply)


class Place:
    """The network, its store, and whatever sits there."""

    def __init__(self) -> None:
        self.network, self.hub = LocalNetwork(), LocalHub()
        self.peers = Peers(self.network.at("router:1"))
        self.infos: list[NodeInfo] = []
        self.sats: list[Sat] = []
        self._steps = 0

    async def store(self) -> None:
        memory = SimMemory(256 * SLOT)
        transfer = LocalTransfer("store-0#1", self.hub)
        config = StoreConfig(arena_bytes=256 * SLOT, slot_bytes=SLOT)
        node = assemble_store(config, G, [Plane(transfer, transfer.register(memory))], memory, OFFLOAD)
        await self.network.listen("store-0:1", node)
        self.infos.append(NodeInfo(NodeId("store-0"), G, "store", "store-0:1"))

    def client(self, owner: str) -> StoreClient:
        memory = SimMemory(16 * SLOT)
        transfer = LocalTransfer(f"{owner}#1", self.hub)
        planes = [Plane(transfer, transfer.register(memory))]
        client = StoreClient(Peers(self.network.at(f"{owner}:1")), planes, Staging(memory, SLOT), OFFLOAD)
        client.set_nodes(self.infos)
        return client

    async def seat(
        self,
        kind: str,
        role: Role = "decode",
        cost: EngineCost | None = None,
        limits: WorkerConfig = LIMITS,
        config: AdapterConfig = PATIENT,
        name: str = "",
    ) -> Sat:
        name = name or f"{role}-{len(self.sats)}"
        info = NodeInfo(NodeId(name), G, role, f"{name}:1", model=MODEL)
        if kind == "native":
            sat = self._native(info, cost, limits)
        else:
            sat = await self._stock(kind, info, cost, limits, config)
        await self.network.listen(sat.address, sat.seat.service)
        self.sats.append(sat)
        self.infos.append(msgspec.structs.replace(sat.seat.info))
        for other in self.sats:
            other.seat.set_members(Members(1, tuple(self.infos)))
        await sat.seat.served()
        return sat

    def _native(self, info: NodeInfo, cost: EngineCost | None, limits: WorkerConfig) -> Sat:
        memory = SimMemory(limits.staging_blocks * SLOT)
        transfer = LocalTransfer(f"{info.node}#1", self.hub)
        peers = Peers(self.network.at(info.address))
        worker = assemble_worker(
            info,
            FakeEngine(INFO, cost),
            memory,
            [Plane(transfer, transfer.register(memory))],
            peers,
            OFFLOAD,
            limits,
            {"prefill": PrefillService, "decode": lambda host: DecodeService(host, peers)},
            buffer_bytes=SLOT,
        )
        return Sat(worker, info.address, None, None)

    async def _stock(
        self, kind: str, info: NodeInfo, cost: EngineCost | None, limits: WorkerConfig, config: AdapterConfig
    ) -> Sat:
        engine = StockEngine(cost, self.client(f"{info.node}-engine"))
        listening = await Listening(app_of(kind, engine)).start()
        server, dialect = StockServer(listening.url), dialect_of(kind)
        facts = await known(server, dialect, 5.0)
        peers = Peers(self.network.at(info.address))
        seat = StockSeat(info, server, dialect, facts, INFO.layout, peers, limits, config)
        return Sat(seat, info.address, engine, listening)

    def request(
        self, prompt: Sequence[int], sampling: Sampling, emitted: Sequence[int] = (), **more: Any
    ) -> DecodeStep:
        self._steps += 1
        trace = TraceId(more.pop("trace", f"t{self._steps}"))
        step = DecodeStep(
            StepId(f"s{self._steps}"),
            trace,
            INFO.layout.root(),
            pack_tokens(prompt),
            pack_tokens(emitted),
            "",
            NodeId("store-0"),
            None,
            sampling,
            trace,
        )
        return msgspec.structs.replace(step, **more)

    async def stream(self, sat: Sat, request: Request) -> AsyncGenerator[Reply, None]:
        async with aclosing(self.peers.stream(sat.address, request, idle_timeout_s=5.0)) as replies:
            async for reply in replies:
                yield reply

    async def run(self, sat: Sat, request: Request) -> Told:
        told = Told()
        async with aclosing(self.stream(sat, request)) as replies:
            async for reply in replies:
                told.take(reply)
        assert told.done is not None, "a step ends in one terminal message"
        return told

    async def close(self) -> None:
        for sat in self.sats:
            for task in sat.tasks:
                task.cancel()
            await asyncio.gather(*sat.tasks, return_exceptions=True)
            await sat.seat.aclose()
            if sat.listening is not None:
                await sat.listening.kill()
                for stop in sat.engine.running.values():
                    stop.set()
                sat.engine.stalled.set()
                await asyncio.gather(*sat.engine.tasks, return_exceptions=True)
        await self.peers.close()


def app_of(kind: str, engine: StockEngine) -> Any:
    if kind == "vllm":
        return VLLMServer(engine).app()
    return SGLangServer(engine, incremental=kind == "sglang").app()


def dialect_of(kind: str) -> Dialect:
    """SGLang's knows the model's end token, or does not: then it ends answers itself."""
    return VLLM() if kind == "vllm" else SGLang([INFO.vocab_size - 1] if kind == "sglang" else [])


def play(case: Callable[[Place], Awaitable[None]]) -> None:
    """A case on a place with a store."""

    async def main() -> None:
        async with asyncio.timeout(LIMIT_S):
            place = Place()
            try:
                await place.store()
                await case(place)
            finally:
                await place.close()

    asyncio.run(main())


async def until(what: Callable[[], bool], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not what():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


ROOT: BlockHash = INFO.layout.root()
