"""Traces between and beside their steps, on a whole cluster under virtual time: forks, recalls, ends."""

import asyncio

import msgspec
import pytest

from router.dispatch.steps import Finished, Output, StepRequest
from router.policy.retention import RetentionConfig
from router.traces.effects import BringBack
from router.traces.trace import Trace
from sim import loop as virtual
from sim.faults import FaultPlan
from sim.shape import ROLES, ROUTER
from sim.world import World
from tests.sim.direct import ask
from tracehaul.engine.fake import fake_info
from tracehaul.wire.errors import ClusterError, TraceDeleted
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import StepId, TraceId
from tracehaul.wire.steps import Sampling

CALM = FaultPlan(faults=(), end_s=1.0, frame_delay_s=0.0005, copy_delay_s=0.0005)
BLOCK = 8
PREFIX = [n % 250 for n in range(40 * BLOCK)]


class Cluster:
    """One without faults."""

    def __init__(self, retention=None, kv_tokens_max=4096, nodes=None):
        self.world = World(3, CALM)
        shape = self.world.shape
        dispatch = msgspec.structs.replace(shape.dispatch, retention=retention or RetentionConfig())
        store = msgspec.structs.replace(shape.store, arena_bytes=4000 * 4096, quota_bytes={})
        worker = msgspec.structs.replace(
            shape.worker, local_prefill_tokens=16, chunk_tokens=64, sequences_max=16, staging_blocks=64, group_blocks=8
        )
        self.world.shape = msgspec.structs.replace(
            shape,
            dispatch=dispatch,
            store=store,
            worker=worker,
            engine=fake_info(context_max=1024, kv_tokens_max=kv_tokens_max),
            below=None,
        )
        self.nodes = nodes or list(ROLES)
        self.steps = 0

    async def start(self):
        lives = [self.world.start(node) for node in self.nodes]
        await asyncio.gather(*(life.ready.wait() for life in lives))

    @property
    def dispatch(self):
        return self.world.lives[ROUTER].dispatch

    @property
    def computed(self):
        return sum(life.engine.computed_tokens for life in self.world.lives.values() if life.engine is not None)

    def trace(self, name) -> Trace:
        trace = self.dispatch.traces.get(("", TraceId(name)))
        assert trace is not None
        return trace

    async def step(self, trace, prompt, *, parent=None, max_tokens=4, final=False):
        """Its output and its end."""
        self.steps += 1
        request = StepRequest(
            step=StepId(f"{trace}-{self.steps}"),
            trace=TraceId(trace),
            parent=None if parent is None else TraceId(parent),
            prompt=pack_tokens(prompt),
            sampling=Sampling(max_tokens=max_tokens, temperature=0.0),
            final=final,
        )
        answer = ask(self.world, request)
        output, done = [], None
        while (event := await answer.get()) is not None:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Output):
                output += event.tokens
            if isinstance(event, Finished):
                done = event
        assert done is not None
        return output, done


def run(use, **options):
    async def main():
        cluster = Cluster(**options)
        await cluster.start()
        return await use(cluster)

    return virtual.run(main, 0)


def idle(cluster, worker):
    return [(r.trace, r.length) for r in cluster.world.lives[worker].host.residency.all()]


def test_the_next_step_is_delivered_what_the_last_one_left():
    async def use(cluster):
        output, first = await cluster.step("a", PREFIX)
        assert (first.hits.theoretical, first.hits.delivered, first.hits.losses) == (0, 0, {})
        _, second = await cluster.step("a", PREFIX + output + [7, 8, 9])
        left = len(PREFIX) + len(output) - 1
        assert (second.hits.theoretical, second.hits.delivered, second.hits.losses) == (left, left, {})
        trace = cluster.trace("a")
        assert [step.ending for step in trace.steps] == ["length", "length"]
        assert trace.steps[1].parent == trace.steps[0].step
        assert trace.retention is not None

    run(use)


def test_a_deleted_trace_ends_its_step_and_frees_its_worker():
    async def use(cluster):
        output, _ = await cluster.step("a", PREFIX)
        worker = cluster.trace("a").lefts[-1].warm.node
        assert idle(cluster, worker)
        running = asyncio.ensure_future(cluster.step("a", PREFIX + output + [5], max_tokens=500))
        await asyncio.sleep(0.2)
        assert not running.done()
        assert await cluster.dispatch.book.delete("", TraceId("a"))
        with pytest.raises(TraceDeleted):
            await running
        await asyncio.sleep(1.0)
        assert len(cluster.dispatch.traces) == 0
        assert cluster.world.lives[worker].host.load().running == 0
        output, done = await cluster.step("a", PREFIX)
        assert done.hits.theoretical == 0

    run(use)


def test_an_ended_trace_leaves_its_workers_memory():
    async def use(cluster):
        await cluster.step("a", PREFIX, final=True)
        worker = cluster.trace("a").steps[-1].decode
        await asyncio.sleep(0.5)
        assert idle(cluster, worker) == []

    run(use)


def test_a_last_step_that_failed_has_not_ended_its_trace():
    async def use(cluster):
        output, _ = await cluster.step("a", PREFIX)
        for life in cluster.world.lives.values():
            if ROLES[life.node] == "decode":
                cluster.world.crash(life)
        with pytest.raises(ClusterError):
            await cluster.step("a", PREFIX + output + [5], final=True)
        assert cluster.trace("a").state == "acting"
        assert cluster.trace("a").lefts, "its client asks again, and continues what there is"

    run(use)


def test_a_context_that_gave_way_comes_back_at_the_clients_word():
    async def use(cluster):
        output, _ = await cluster.step("a", PREFIX)
        trace = cluster.trace("a")
        worker = trace.lefts[-1].warm.node
        assert cluster.dispatch.book.suspend("", TraceId("a"), 1000.0, 5000.0, "make") is not None
        await asyncio.sleep(0.1)
        others = 0
        while ("a", len(PREFIX) + len(output) - 1) in idle(cluster, worker):
            others += 1
            assert others < 20
            await cluster.step(f"other-{others}", [others % 250, *PREFIX], final=True)
            await cluster.step(f"big-{others}", [100 + others % 100, *PREFIX, *PREFIX], max_tokens=1)
            await asyncio.sleep(0.1)
        for name in [trace.key for trace in cluster.dispatch.traces.all() if trace.trace != "a"]:
            await cluster.dispatch.book.delete(*name)
        await asyncio.sleep(0.5)
        before = cluster.computed
        assert cluster.dispatch.book.resume("", TraceId("a")) is not None
        await asyncio.sleep(2.0)
        assert ("a", len(PREFIX) + len(output) - 1) in idle(cluster, worker)
        assert cluster.computed == before
        assert cluster.dispatch.retainer.stats.recalled_tokens > 0
        _, done = await cluster.step("a", PREFIX + output + [5])
        assert done.usage.resident_tokens == len(PREFIX) + len(output) - 1
        assert done.hits.losses == {}

    run(use, kv_tokens_max=1024)


@pytest.mark.parametrize("told", [False, True])
def test_what_comes_back_on_a_guess_does_not_push_out_what_came_back_and_at_the_clients_word_it_does(told):
    async def use(cluster):
        outputs = {}
        for name, first in (("a", 1), ("b", 2)):
            outputs[name], _ = await cluster.step(name, [first, *PREFIX, *PREFIX])
            assert cluster.dispatch.book.suspend("", TraceId(name), 1000.0, 5000.0, "make") is not None
        assert cluster.dispatch.book.resume("", TraceId("a")) is not None
        await asyncio.sleep(2.0)
        b = cluster.trace("b")
        cluster.dispatch.retainer._bring_back(BringBack(b.key, b.lefts[-1], b.home, "so it is", told))
        await asyncio.sleep(2.0)
        back, first = ("b", 2) if told else ("a", 1)
        _, done = await cluster.step(back, [first, *PREFIX, *PREFIX, *outputs[back], 5])
        assert done.usage.resident_tokens == 2 * len(PREFIX) + len(outputs[back])

    run(use, kv_tokens_max=1024, nodes=[node for node in ROLES if node != "decode-1"])


def test_a_trace_that_is_not_back_by_its_deadline_has_ended():
    async def use(cluster):
        await cluster.step("a", PREFIX)
        cluster.dispatch.book.suspend("", TraceId("a"), 1.0, 5.0, None)
        assert cluster.trace("a").state == "suspended"
        await asyncio.sleep(6.0)
        assert cluster.trace("a").state == "ended"
        assert cluster.trace("a").context_tokens == 0

    run(use)


def test_gaps_are_learned():
    async def use(cluster):
        prompt = list(PREFIX)
        for _ in range(3):
            output, _ = await cluster.step("a", prompt, max_tokens=2)
            prompt += [*output, 3]
            await asyncio.sleep(4.0)
        gap = cluster.dispatch.traces.gaps.expect("", ())
        assert gap.seen == 2
        assert cluster.dispatch.retainer.stats.pins >= 3

    run(use)


ALL_NODES = list(ROLES)
NO_PREFILL = [node for node in ROLES if not node.startswith("prefill")]


@pytest.mark.parametrize("nodes", [ALL_NODES, NO_PREFILL])
def test_children_at_once_compute_nothing_of_what_their_parent_left(nodes):
    async def use(cluster):
        output, _ = await cluster.step("parent", PREFIX)
        before, left = cluster.computed, len(PREFIX) + len(output) - 1
        prompts = [[*PREFIX, *output, 200 + child, *range(20)] for child in range(8)]
        ends = await asyncio.gather(*(cluster.step(f"c{i}", p, parent="parent") for i, p in enumerate(prompts)))
        for _, done in ends:
            assert done.hits.theoretical == left
            assert done.hits.delivered >= left - left % BLOCK
        own = len(prompts[0]) - left + 4
        assert cluster.computed - before <= 8 * (own + BLOCK)
        assert len(cluster.trace("parent").children) == 8
        warm = [cluster.trace(f"c{child}").decisions[0].decision.warm for child in range(8)]
        assert sum(worker is not None for worker in warm) == 1, "one of them has the parent's memory"
        assert cluster.trace("parent").lefts[-1].warm is None

    run(use, nodes=nodes)


@pytest.mark.parametrize("nodes", [ALL_NODES, NO_PREFILL])
def test_siblings_at_once_compute_what_they_share_once(nodes):
    async def use(cluster):
        await asyncio.sleep(2.0)
        before = cluster.computed
        prompts = [[*PREFIX, 200 + child, *range(20)] for child in range(8)]
        await asyncio.gather(*(cluster.step(f"c{i}", prompt) for i, prompt in enumerate(prompts)))
        own = 21 + 4 + BLOCK
        assert cluster.computed - before <= len(PREFIX) + 8 * own

    run(use, nodes=nodes)
