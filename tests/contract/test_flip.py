"""A worker changes its role with all that it has: the same for the fake engine and for torch on a tiny model."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from decode.worker import DecodeService
from kvstore.config import StoreConfig
from kvstore.node.assemble import assemble_store
from prefill.worker import PrefillService
from router.dispatch.flips import FlipOutcome, Flips
from router.fleet.flips import FlipConfig
from router.fleet.members import MemberRegistry
from sim.links import SimMemory
from tests.contract.test_engine import save_tiny_model
from tests.seats import OFFLOAD, Told, until
from tracehaul.engine.base import Engine
from tracehaul.engine.fake import EngineCost, FakeEngine, fake_info
from tracehaul.engine.torch_engine import TorchEngine, TorchEngineConfig
from tracehaul.rpc.base import NO_CONTEXT
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.member import Member, Serving, serving
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.transfer.local import LocalHub, LocalTransfer
from tracehaul.transfer.plane import Plane
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import Unavailable, WrongNode
from tracehaul.wire.hashing import extend_chain, pack_tokens, salted
from tracehaul.wire.ids import BlockHash, Generation, NodeId, StepId, TraceId
from tracehaul.wire.messages import Request
from tracehaul.wire.operations import Discard
from tracehaul.wire.steps import (
    DecodeStep,
    ForgetContext,
    KeepContext,
    PrefillDone,
    PrefillStep,
    PrefillToken,
    Resident,
    Sampling,
)
from worker.assemble import Worker, assemble_worker
from worker.config import WorkerConfig

SLOT = 32768
ROUTER = "router:1"
KINDS = ("fake", "torch")
PROMPT = [(7 * at * at + 3 * at) % 200 for at in range(150)]
BRIEF = Sampling(8, temperature=0.0)
LONG = Sampling(200, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), 16)


class Fleet:
    """A router's registry, one store and workers, as members."""

    def __init__(self, kind: str, model: Path, drain_s: float) -> None:
        config = FlipConfig(drain_s=drain_s, cooldown_s=0.0)
        self.network, self.hub = LocalNetwork(), LocalHub()
        self.peers = Peers(self.network.at(ROUTER))
        self.registry = MemberRegistry(lambda _: None, None, config)
        self.flips = Flips(self.peers, self.registry, config)
        self.workers: dict[str, Worker] = {}
        self.steps = 0
        self._kind, self._model = kind, model
        self._lives: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.network.listen(ROUTER, self.registry)
        memory = SimMemory(64 * SLOT)
        transfer = LocalTransfer("store-0#1", self.hub)
        config = StoreConfig(arena_bytes=64 * SLOT, slot_bytes=SLOT)
        planes = [Plane(transfer, transfer.register(memory))]
        node = assemble_store(config, Generation(1), planes, memory, OFFLOAD)
        info = NodeInfo(NodeId("store-0"), Generation(1), "store", "store-0:1")
        self._live(Member(info, node, node.load, node.set_members))
        for name in ("prefill-0", "decode-0", "decode-1"):
            await self._worker(NodeId(name))
        await until(lambda: len(self.registry.live("decode")) == 2 and len(self.registry.live("prefill")) == 1)
        await until(lambda: all(worker.probe.serving for worker in self.workers.values()))
        self.registry._whole_at_s = clock.now_s()  # type: ignore[attr-defined] - nobody else lives who could come

    async def _worker(self, name: NodeId) -> None:
        transfer = LocalTransfer(f"{name}#1", self.hub)
        memory, peers = SimMemory(16 * SLOT), Peers(self.network.at(f"{name}:1"))
        role: Any = name.partition("-")[0]
        worker = self.workers[name] = assemble_worker(
            NodeInfo(name, Generation(1), role, f"{name}:1"),
            await self._engine(),
            memory,
            [Plane(transfer, transfer.register(memory))],
            peers,
            OFFLOAD,
            WorkerConfig(local_prefill_tokens=512, staging_blocks=16),
            {"prefill": PrefillService, "decode": lambda host: DecodeService(host, peers)},
            buffer_bytes=SLOT,
        )
        self._live(worker.member)

    async def _engine(self) -> Engine:
        if self._kind == "fake":
            return FakeEngine(fake_info(context_max=512, kv_tokens_max=2048), EngineCost(iteration_s=0.005))
        config = TorchEngineConfig(str(self._model), dtype="float32", device="cpu", threads=1, kv_tokens_max=2048)
        return await TorchEngine.load(config)

    def _live(self, member: Member) -> None:
        async def live() -> None:
            peers = Peers(self.network.at(member.info.address))
            async with serving(member, self.network, peers, [ROUTER], heartbeat_s=0.1) as node:
                with suppress(asyncio.CancelledError):
                    await self._run(node)

        self._lives.append(asyncio.create_task(live()))

    async def _run(self, node: Serving) -> None:
        await node.run(asyncio.Event(), drain_timeout_s=0.0, told=lambda _: None)

    async def close(self) -> None:
        for life in self._lives:
            life.cancel()
        await asyncio.gather(*self._lives, return_exceptions=True)
        for worker in self.workers.values():
            await worker.aclose()
            if isinstance(worker.host.engine, TorchEngine):
                await worker.host.engine.aclose()
        await self.flips.close()
        await self.peers.close()

    # --- steps ----------------------------------------------------------------------------------------------------

    def decode(self, prompt: list[int], sampling: Sampling, emitted: list[int] | None = None) -> DecodeStep:
        root = next(iter(self.workers.values())).host.root
        self.steps += 1
        packed, trace = pack_tokens(prompt), TraceId("t")
        step = StepId(f"s{self.steps}")
        return DecodeStep(
            step, trace, root, packed, pack_tokens(emitted or []), "", NodeId("store-0"), None, sampling, trace
        )

    def prefill(self, prompt: list[int]) -> PrefillStep:
        step = self.decode(prompt, BRIEF)
        return PrefillStep(step.step, step.trace, step.root, step.prompt, "", step.home, BRIEF, 0, step.trace)

    async def stream(self, name: str, request: Request) -> AsyncGenerator[Any, None]:
        async with aclosing(self.peers.stream(f"{name}:1", request, idle_timeout_s=5.0)) as replies:
            async for reply in replies:
                yield reply

    async def run(self, name: str, step: DecodeStep, told: Told | None = None) -> Told:
        told = told or Told()
        async with aclosing(self.stream(name, step)) as replies:
            async for reply in replies:
                told.take(reply)
        return told

    def hashes(self, tokens: list[int]) -> list[BlockHash]:
        layout = self.workers["decode-0"].host.engine.info.layout
        return extend_chain(salted(layout.root(), ""), pack_tokens(tokens), layout.block_tokens, (), 0)

    async def held(self, tokens: list[int]) -> set[NodeId | None]:
        return set(await self.workers["prefill-0"].host.client.exists(self.hashes(tokens)))

    async def flip(self, name: str, role: Any) -> FlipOutcome:
        return await self.flips.flip(NodeId(name), role)


@asynccontextmanager
async def fleet(kind: str, model: Path, drain_s: float) -> AsyncGenerator[Fleet, None]:
    async with asyncio.timeout(60):
        made = Fleet(kind, model, drain_s)
        try:
            await made.start()
            yield made
        finally:
            await made.close()


def play(kind: str, model: Path, case: Callable[[Fleet], Awaitable[None]], drain_s: float = 2.0) -> None:
    async def main() -> None:
        async with fleet(kind, model, drain_s) as made:
            await case(made)

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_has_serves_in_either_role(kind: str, model: Path) -> None:
    async def case(fleet: Fleet) -> None:
        first = await fleet.run("decode-1", fleet.decode(PROMPT, BRIEF))
        longer = [*PROMPT, *first.tokens, 5, 6, 7]
        had = len(PROMPT) + 7
        host = fleet.workers["decode-1"].host
        before = host.engine.free_tokens
        assert (await fleet.flip("decode-1", "prefill")).flipped
        assert host.engine.free_tokens == before, "nothing was dropped"
        with pytest.raises(WrongNode):
            await fleet.run("decode-1", fleet.decode(longer, BRIEF))
        # As a prefill worker it computes what is new alone, without asking the store for anything.
        pulled = host.stats.pulled_tokens
        told = [reply async for reply in fleet.stream("decode-1", fleet.prefill(longer))]
        token = next(reply for reply in told if isinstance(reply, PrefillToken))
        assert isinstance(told[-1], PrefillDone)
        assert (token.computed_from, host.stats.pulled_tokens) == (had, pulled)
        assert told[-1].published_tokens == len(longer)
        # Others have all of it from the store, and so has who decodes again.
        elsewhere = await fleet.run("decode-0", fleet.decode(longer, BRIEF))
        assert elsewhere.tokens[0] == token.token
        assert elsewhere.end.usage.computed_from >= len(longer) - 1
        assert (await fleet.flip("decode-1", "decode")).flipped
        again = await fleet.run("decode-1", fleet.decode(longer, BRIEF))
        assert again.tokens == elsewhere.tokens
        assert again.end.usage.resident_tokens >= len(longer) - 1

    play(kind, model, case)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_cut_goes_on_elsewhere_to_the_token(kind: str, model: Path) -> None:
    async def case(fleet: Fleet) -> None:
        whole = (await fleet.run("decode-0", fleet.decode([9, *PROMPT], LONG))).tokens
        other = [8, *PROMPT]
        told = Told()
        running = asyncio.create_task(fleet.run("decode-1", fleet.decode([9, *PROMPT], LONG), told))
        beside = asyncio.create_task(fleet.run("decode-1", fleet.decode(other, LONG)))
        await until(lambda: len(told.tokens) > 20)
        assert (await fleet.flip("decode-1", "prefill")).flipped
        with pytest.raises(Unavailable):
            await running
        with pytest.raises(Unavailable):
            await beside
        assert told.done is None
        assert 20 < len(told.tokens) < 200
        assert told.tokens == whole[: len(told.tokens)]
        # Also where nothing of it was before: all but the last token's KV had been written.
        assert await fleet.held([9, *PROMPT, *told.tokens][:-1]) == {"store-0"}
        rest = await fleet.run("decode-0", fleet.decode([9, *PROMPT], LONG, told.tokens))
        assert told.tokens + rest.tokens == whole
        assert fleet.workers["decode-1"].host.load().running == 0

    play(kind, model, case, drain_s=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_store_has_lost_is_written_back_before_it_serves_prompts(kind: str, model: Path) -> None:
    async def case(fleet: Fleet) -> None:
        first = await fleet.run("decode-1", fleet.decode(PROMPT, BRIEF))
        longer = [*PROMPT, *first.tokens]
        assert await fleet.held(PROMPT) == {"store-0"}
        await fleet.peers.call("store-0:1", Discard(tuple(fleet.hashes(longer))), timeout_s=2.0)
        assert await fleet.held(PROMPT) == {None}
        assert (await fleet.flip("decode-1", "prefill")).flipped
        assert await fleet.held(PROMPT) == {"store-0"}
        elsewhere = await fleet.run("decode-0", fleet.decode(longer, BRIEF))
        assert elsewhere.end.usage.pulled_tokens >= len(PROMPT) // 32 * 32

    play(kind, model, case)


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_are_kept_and_forgotten_whatever_the_role(kind: str, model: Path) -> None:
    async def case(fleet: Fleet) -> None:
        await fleet.run("decode-1", fleet.decode(PROMPT, BRIEF))
        worker = fleet.workers["decode-1"]
        assert (await fleet.flip("decode-1", "prefill")).flipped
        kept = await worker.service.call(KeepContext(TraceId("t"), "", 60.0), NO_CONTEXT)
        assert kept == Resident(len(PROMPT) + 7)
        assert await worker.service.call(ForgetContext(TraceId("t"), ""), NO_CONTEXT) == Resident(0)
        assert worker.host.engine.free_tokens == worker.host.engine.info.kv_tokens_max

    play(kind, model, case)


def test_the_last_of_a_kind_and_a_stock_engine_keep_their_role(model: Path) -> None:
    async def case(fleet: Fleet) -> None:
        assert "last prefill worker" in (await fleet.flip("prefill-0", "decode")).why
        info = fleet.registry.known(NodeId("decode-1"))
        assert info is not None
        assert msgspec.structs.asdict(info)["roles"] == ("prefill", "decode")
        assert "already" in (await fleet.flip("decode-1", "decode")).why
        assert "no worker" in (await fleet.flip("store-0", "decode")).why

    play("fake", model, case)
