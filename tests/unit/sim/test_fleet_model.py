"""The fleet as a whole: nothing is lost, the index is the stores', and the same seed is the same run."""

import pytest

from bench.fleet_model.fleets import fleet_of
from bench.fleet_model.tasks import tasks_of
from bench.replay.recording import Blocks, Step, Trace
from router.fleet.index import Index
from sim.fleet.routing import CacheAware, Ours, Sticky
from sim.fleet.run import Experiment, Figures, capacity
from sim.fleet.shape import StoreKind
from sim.fleet.store import Store
from sim.fleet.work import Task
from tracehaul.wire.ids import BlockHash, NodeId

BLOCK = 1024


def recording(traces: int = 6, steps: int = 8) -> list[Task]:
    """Sessions that grow; the third step of each starts two others, and its fifth gives up half of what was."""
    made: list[Trace] = []
    for number in range(traces):
        calls: list[Step] = []
        ids: tuple[int, ...] = ()
        for step in range(steps):
            ids = (
                *ids[: len(ids) // 2 if step == 4 else len(ids)],
                *range(1000 * step, 1000 * step + 80 + 10 * number),
            )
            prompt = Blocks(f"s{number}", ids, 64, len(ids) * 64)
            children = ()
            if step == 2:
                own = Step(Blocks(f"s{number}", (*ids, 7), 64, len(ids) * 64 + 30), 20, 0.5)
                children = tuple(Trace(f"s{number}.{child}", (own, own), f"s{number}") for child in range(2))
            calls.append(Step(prompt, 150, 4.0 + step, children))
        made.append(Trace(f"s{number}", tuple(calls)))
    return tasks_of(made, BLOCK)


def figures(routing: Ours | Sticky | CacheAware, seed: int = 1, load: float = 1.0) -> tuple[Figures, Experiment]:
    shape = fleet_of(4, private=routing.private, disk=True, block_tokens=BLOCK)
    tasks = recording()
    could = capacity(shape, tasks)
    experiment = Experiment(shape, tasks, round(could.agents * load), routing, seed)
    experiment.populate(could.step_s)
    return experiment.measure(20.0, 60.0), experiment


@pytest.mark.parametrize("routing", [Ours, Sticky, CacheAware])
def test_the_same_seed_is_the_same_run_and_work_is_conserved(routing: type[Ours | Sticky | CacheAware]) -> None:
    one, experiment = figures(routing())
    assert one == figures(routing())[0]
    assert one.steps > 100
    assert 0 < one.busy <= 1.0 + 1e-6
    assert 0.5 < one.hits < 1.0
    for table in (experiment.fleet.decodes, experiment.fleet.prefills):
        assert table.total <= experiment.agents * 3, "what ended is off the books"
    for worker in experiment.fleet.workers.values():
        assert worker.idle_tokens == pytest.approx(sum(worker.idle.values()))
        assert worker.free_tokens + worker.idle_tokens >= -1.0


def test_agents_that_are_few_get_on_at_their_own_pace() -> None:
    few, _ = figures(Ours(), load=0.1)
    many, _ = figures(Ours(), load=3.0)
    assert few.step_mean_s < many.step_mean_s
    assert many.traces_per_worker_h > 2 * few.traces_per_worker_h


def test_the_routers_index_says_what_the_stores_have() -> None:
    _, experiment = figures(Ours())
    fleet = experiment.fleet
    fleet.index.check()
    for node, store in fleet.stores.items():
        said = fleet.index.held(node)
        assert said.keys() == store.memory.keys() | store.disk.keys()
        assert all((block in store.memory) == (tier == 0) for block, tier in said.items())


def test_a_store_gives_up_the_end_of_what_was_used_least() -> None:
    index = Index()
    store = Store(NodeId("s"), StoreKind(1, 4 * BLOCK, 0.0, 5 * BLOCK, 1e-6), BLOCK, index)
    a, b = ([BlockHash(bytes([row, place])) for place in range(3)] for row in range(2))
    store.put(a)
    store.put(b)
    assert set(store.memory) == {*b, a[0]}
    assert store.leading(a) == (2, 1), "one in memory, one on disk, the last is gone"
    assert index.match(a).blocks == 2
    assert [run.tier for run in index.match(a).runs] == [0, 1]
    store.put(a[:2])
    assert store.leading(a) == (2, 0), "used again: up from disk"
    assert store.leading(b)[0] == 3
    index.check()


def test_what_a_step_shares_with_the_one_before_is_what_their_names_say() -> None:
    task = recording()[0]
    calls = task.calls
    assert [call.keeps for call in calls[:4]] == [0, 80 * 64, 160 * 64, 240 * 64]
    assert calls[4].keeps == 160 * 64, "half of what was"
    assert calls[1].chain[:5] == calls[0].chain
    assert task.steps == 8 + 4
