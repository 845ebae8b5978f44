"""Every checker can fail: each is shown a cluster with one bug put into it on purpose."""

import asyncio
import logging

import msgspec
import pytest

from decode.worker import DecodeService
from decode.worker import _Step as DecodeRun
from kvstore.client.reader import Reader
from kvstore.client.staging import Staging
from kvstore.index.arena import Arena
from kvstore.index.slot_table import SlotTable
from kvstore.node.node import StoreNode
from router.calls.memory import Memory
from router.dispatch.dispatch import Dispatch
from router.fleet.index import Index
from sim import run as run_module
from sim.checker import Findings, OutputChecker, SampledChecker, TerminalChecker
from sim.faults import Crash, FaultPlan, Storm
from sim.http import Exchange
from sim.run import simulate
from sim.shape import FAULTS_END_S, FLEET, MIX
from sim.slot_checker import SlotChecker
from sim.text import SimTextStream, shown
from tracehaul.engine.fake import EngineCost, FakeEngine
from tracehaul.runtime import clock
from tracehaul.wire.blocks import Events, LeasedBlock, Removed
from tracehaul.wire.errors import Overloaded
from tracehaul.wire.steps import StepDone
from worker.host import WorkerHost
from worker.iteration import IterationLoop

SMALL = msgspec.structs.replace(MIX, traces=8, hang_up_share=0.3)
CALM = FaultPlan(faults=(), end_s=FAULTS_END_S, frame_delay_s=0.0005, copy_delay_s=0.0005)


@pytest.fixture(autouse=True)
def quiet():
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    yield
    root.setLevel(level)


def plan(*faults):
    return msgspec.structs.replace(CALM, faults=faults)


def rules(faults=CALM, seed=4, **shape):
    """Which rules a run violates; ``shape`` replaces fields of the store's and the workers' configs."""

    def prepare(world):
        store = {key: value for key, value in shape.items() if hasattr(world.shape.store, key)} | {"quota_bytes": {}}
        worker = {key: value for key, value in shape.items() if hasattr(world.shape.worker, key)}
        world.shape = msgspec.structs.replace(
            world.shape,
            store=msgspec.structs.replace(world.shape.store, **store),
            worker=msgspec.structs.replace(world.shape.worker, **worker),
            below=None,  # what is below memory has checkers, and tests, of its own
        )

    result = simulate(seed, mix=SMALL, plan=faults, prepare=prepare)
    return {line.split("] ")[1].split(":")[0] for line in result.findings}


STORM = plan(Storm(0.0, FAULTS_END_S, corrupt_share=0.3, lost_share=0.0, late_share=0.0, late_s=1.0))
LATE = plan(Storm(0.0, FAULTS_END_S, corrupt_share=0.0, lost_share=0.0, late_share=0.4, late_s=8.0))
DEATH = plan(*(Crash(float(at), FLEET.stores[at % 3], 0.5) for at in range(1, 20)))


@pytest.mark.parametrize("faults", [CALM, STORM, LATE, DEATH], ids=["calm", "storm", "late", "death"])
def test_without_a_bug_nothing_is_found(faults):
    assert rules(faults, arena_bytes=30 * 4096) == set()


def test_terminal_messages(monkeypatch):
    real = DecodeService.stream

    async def twice(self, request, context):
        async for reply in real(self, request, context):
            yield reply
            if isinstance(reply, StepDone):
                yield reply

    monkeypatch.setattr(DecodeService, "stream", twice)
    assert "terminal" in rules()


def test_output_equals_the_oracle(monkeypatch):
    async def trust(self, view, way, reads, results, expires_s):
        await self._read(view, way, reads, expires_s)
        for read in reads:
            results[read.wanted.place] = read.block.size_bytes

    monkeypatch.setattr(Reader, "_land", trust)
    assert "output" in rules(STORM)


def test_output_is_not_sampled_anew(monkeypatch):
    real = FakeEngine._compute

    def restless(self, item, state):
        result = real(self, item, state)
        if result.token is None or self.computed_tokens % 50:
            return result
        return result._replace(token=(result.token + 1) % 256)

    monkeypatch.setattr(FakeEngine, "_compute", restless)
    assert "output" in rules()


def test_tokens_that_a_client_has_are_not_sampled_again():
    async def main():
        findings = Findings()
        checker = SampledChecker(findings)
        checker.received("step", "router#1", 3)
        checker.asked("step", "router#1", 3)
        checker.asked("step", "router#2", 0)  # it knows nothing of that
        assert not findings.lines
        checker.asked("step", "router#1", 2)
        assert len(findings.lines) == 1

    asyncio.run(main())


def test_no_eviction_under_a_lease(monkeypatch):
    take, remove = SlotTable.take, SlotTable.remove

    def choose(self, count, group):
        leased = next((slot for slot in self.published.values() if self.lease_count[slot]), None)
        if not self.free and leased is not None:
            self.remove(leased)
        return take(self, count, group)

    def forget(self, slot):
        self.lease_count[slot] = 0
        remove(self, slot)

    monkeypatch.setattr(SlotTable, "take", choose)
    monkeypatch.setattr(SlotTable, "remove", forget)
    monkeypatch.setattr(SlotTable, "unprotect", lambda self, slots: None)
    slow = msgspec.structs.replace(CALM, copy_delay_s=0.5)
    assert "lease" in rules(slow, seed=20, arena_bytes=24 * 4096, lease_ttl_max_s=6.0, store_timeout_s=5.0)


def test_no_late_write_into_anothers_slot():
    assert "fence" in rules(LATE, seed=4, arena_bytes=24 * 4096, late_write_s=0.001, reservation_ttl_s=0.5)


def test_publish_before_read(monkeypatch):
    lease, exists = Arena.lease, Arena.exists

    def peek(self, block_hash):
        reservation = self._writing.reservations.get(block_hash)
        if reservation is None:
            return None
        slot, table = reservation.slot, self.table
        return LeasedBlock(slot * self.config.slot_bytes, table.size[slot], table.generation[slot], 0)

    def eager(self, hashes, *arguments):
        leased = lease(self, hashes, *arguments)
        blocks = tuple(block or peek(self, h) for block, h in zip(leased.blocks, hashes, strict=True))
        return msgspec.structs.replace(leased, blocks=blocks)

    def reserved_too(self, hashes):
        held = exists(self, hashes)
        return bytes(one or self._writing.reservations.get(h) is not None for one, h in zip(held, hashes, strict=True))

    monkeypatch.setattr(Arena, "lease", eager)
    monkeypatch.setattr(Arena, "exists", reserved_too)
    slow = msgspec.structs.replace(CALM, copy_delay_s=2.0)
    assert "publish" in rules(slow, seed=5, local_prefill_tokens=0)


def test_references_return_to_zero(monkeypatch):
    real = Staging.release
    leaked = []

    def forgetful(self, buffers):
        if not leaked and clock.now_s() > 3:
            leaked.append(self)
            buffers = buffers[1:]
        real(self, buffers)

    monkeypatch.setattr(Staging, "release", forgetful)
    assert "references" in rules(staging_blocks=64)


SERVING_S = 2.0
"""By then workers have got a block through each store: what is broken from the start gets no work."""


def test_published_bytes_stay_what_they_were(monkeypatch):
    real = StoreNode._publish

    async def scribble(self, blocks, verified, peer):
        landings = [self.arena.landing(block, peer) for block in blocks if clock.now_s() > SERVING_S]
        outcomes = await real(self, blocks, verified, peer)
        for landing in landings:
            if landing is not None:
                self._verifier._buffer[landing[0]] ^= 1
        return outcomes

    monkeypatch.setattr(StoreNode, "_publish", scribble)
    assert "bytes" in rules()


def test_published_bytes_are_the_kv_of_their_tokens(monkeypatch):
    """A block under a wrong name has a good checksum; only who knows the tokens can tell."""
    real = FakeEngine._pack

    async def shifted(self, state, start, tokens, outs):
        await real(self, state, start, tokens, outs)
        outs[0][0] ^= 1

    monkeypatch.setattr(FakeEngine, "_pack", shifted)
    assert {"bytes"} <= rules()


def test_the_index_equals_the_stores(monkeypatch):
    real = Index.events

    def keeps(self, node, events):
        changes = tuple(change for change in events.changes if not isinstance(change, Removed))
        taken = real(self, node, Events(events.generation, events.first, changes))
        if taken:
            self._nodes[node].sequence = events.first + len(events.changes) - 1
        return taken

    monkeypatch.setattr(Index, "events", keeps)
    assert "index" in rules(arena_bytes=24 * 4096)


def test_a_prompt_is_told_in_the_tokens_that_were_generated(monkeypatch):
    monkeypatch.setattr(Memory, "texts", lambda self, traces: [])
    assert "prompt" in rules()


def test_the_text_is_that_of_the_tokens(monkeypatch):
    monkeypatch.setattr(SimTextStream, "push", lambda self, tokens: shown(tokens) * 2)
    assert "text" in rules()


@pytest.mark.parametrize(
    ("sent", "rule"),
    [
        ((b"data: [DONE]\n\n", b""), "terminal"),
        ((b'"finish_reason":"length"', b'"finish_reason":null'), "output"),
        ((b'"finish_reason":null', b'"finish_reason":"length"'), "output"),
        ((b'"logprobs":{', b'"other":{'), "output"),
        ((b'"completion_tokens":1,', b'"completion_tokens":2,'), "output"),
    ],
)
def test_an_answer_is_whole(monkeypatch, sent, rule):
    real = Exchange.send

    async def tampered(self, message):
        if "body" in message:
            message = {**message, "body": message["body"].replace(*sent)}
        await real(self, message)

    monkeypatch.setattr(Exchange, "send", tampered)
    assert rule in rules()


@pytest.mark.parametrize("heard", [True, False])
def test_a_router_hears_of_a_client_that_leaves(monkeypatch, heard):
    if not heard:
        monkeypatch.setattr(Exchange, "leave", lambda self: None)

    def slow(world):
        cost = EngineCost(iteration_s=0.4)  # a step that nobody ends goes on for seconds
        world.shape = msgspec.structs.replace(world.shape, cost=cost, below=None)

    result = simulate(3, mix=SMALL, plan=CALM, prepare=slow)
    assert any("] abort:" in line for line in result.findings) != heard


def test_cached_tokens_are_not_overstated(monkeypatch):
    real = DecodeRun._usage

    def boast(self, here):
        usage = real(self, here)
        return msgspec.structs.replace(usage, computed_from=usage.prompt_tokens - 1)

    monkeypatch.setattr(DecodeRun, "_usage", boast)
    assert "cached" in rules()


def test_progress_after_healing(monkeypatch):
    real = DecodeService.stream

    async def tired(self, request, context):
        if clock.now_s() > FAULTS_END_S:
            raise Overloaded("for ever")
        async for reply in real(self, request, context):
            yield reply

    monkeypatch.setattr(DecodeService, "stream", tired)
    monkeypatch.setattr(run_module, "PROGRESS_TIMEOUT_S", 60.0)
    late = msgspec.structs.replace(STORM, faults=(Storm(0.0, FAULTS_END_S, 0.0, 0.0, 0.0, 1.0),))
    assert "progress" in rules(late, seed=0)


def test_a_step_that_hangs_is_no_progress(monkeypatch):
    real = IterationLoop.run

    async def stops(self):
        try:
            async with asyncio.timeout(4):
                await real(self)
        except TimeoutError:
            await asyncio.Event().wait()

    monkeypatch.setattr(IterationLoop, "run", stops)
    monkeypatch.setattr(run_module, "PROGRESS_TIMEOUT_S", 60.0)
    assert {"progress", "terminal"} <= rules()


def test_an_abort_frees_at_once(monkeypatch):
    real = DecodeService.stream

    async def lingering(self, request, context):
        try:
            async for reply in real(self, request, context):
                yield reply
        finally:
            await asyncio.sleep(2)

    monkeypatch.setattr(DecodeService, "stream", lingering)
    assert "abort" in rules()


def test_bugs_are_not_swallowed(monkeypatch):
    real = WorkerHost._count

    def broken(self, here):
        real(self, here)
        if clock.now_s() > 5:
            raise ValueError("a bug")

    monkeypatch.setattr(WorkerHost, "_count", broken)
    monkeypatch.setattr(run_module, "PROGRESS_TIMEOUT_S", 30.0)
    assert "bug" in rules()


def test_an_aborted_steps_generator_is_closed_by_the_router(monkeypatch):
    real = Dispatch._attempt

    def crash(self, run, placement):
        self.pools[""].all.decodes.sent(placement.decode, 0.0, 0.0)
        return real(self, run, placement)

    monkeypatch.setattr(Dispatch, "_attempt", crash)
    assert "references" in rules()


def test_the_small_checkers_alone():
    class Book(Findings):
        def add(self, rule, text):
            self.lines.append(rule)

    book = Book()
    terminal = TerminalChecker(book)
    terminal.began("a")
    terminal.message("a", terminal=False)
    terminal.message("a", terminal=True)
    terminal.ended("a", cut_off=False)
    terminal.began("b")
    terminal.ended("b", cut_off=True)
    terminal.finish()
    assert book.lines == []
    terminal.began("c")
    terminal.ended("c", cut_off=False)
    terminal.began("d")
    terminal.finish()
    assert book.lines == ["terminal", "terminal"]
    output = OutputChecker(book)
    output.output("s", [1, 2], [1, 2, 3])
    assert len(book.lines) == 2
    output.output("s", [1, 1], [1, 2, 3])
    assert len(book.lines) == 3
    assert SlotChecker(book, "store", None, memoryview(b"")).grants("w", [0]) == [None]
