"""A worker as a fluid against what its iterations would take one by one."""

import pytest

from sim.fleet.clock import Clock
from sim.fleet.shape import WorkerKind
from sim.fleet.worker import Host, Job, Worker

KIND = WorkerKind(
    count=1,
    token_s=1e-3,
    pair_s=1e-6,
    iteration_s=0.02,
    sequence_s=0.005,
    context_token_s=1e-5,
    pull_token_s=0.0,
    kv_tokens=10_000,
    chunk_tokens=100,
    headroom_tokens=10,
)


class Seen:
    """One worker, and when things happened on it."""

    def __init__(self, kind: WorkerKind = KIND, host: Host | None = None, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.worker = Worker(kind, self.clock, host or Host())
        self.first: dict[str, float] = {}
        self.end: dict[str, float] = {}
        self.suspended: list[str] = []

    def submit(self, name: str, prompt: int, output: int, at_s: float = 0.0, keeps: float = 0.0) -> None:
        def entered(job: Job) -> None:
            self.clock.after(0.0, lambda: self.worker.assembled(job, job.have))

        job = Job(
            name,
            prompt,
            output,
            keeps,
            entered,
            lambda _: self.first.setdefault(name, self.clock.now_s),
            lambda _: self.end.setdefault(name, self.clock.now_s),
            lambda _: self.suspended.append(name),
            rank=at_s,
        )
        self.clock.at(at_s, lambda: self.worker.submit(job))


def test_one_step_takes_its_prompt_and_then_an_iteration_a_token() -> None:
    seen = Seen()
    seen.submit("a", 1000, 11)
    seen.clock.run(1e6)
    prompt_s = KIND.compute_s(0, 1000)
    assert seen.first["a"] == pytest.approx(prompt_s)
    assert seen.end["a"] - seen.first["a"] == pytest.approx(10 * KIND.decode_s(1, 1001 + 5))
    assert seen.worker.busy_s == pytest.approx(seen.end["a"])


def test_what_decodes_waits_for_chunks_and_chunks_for_what_decodes() -> None:
    seen = Seen()
    seen.submit("a", 100, 1001)
    seen.submit("b", 1000, 1, at_s=1.0)
    seen.clock.run(1e6)
    iteration_s = KIND.decode_s(1, 101 + 500)
    assert seen.first["b"] - 1.0 == pytest.approx(KIND.compute_s(0, 1000) + 10 * iteration_s), "ten chunks"
    alone_s = KIND.compute_s(0, 100) + 1000 * iteration_s
    assert seen.end["a"] == pytest.approx(alone_s + KIND.compute_s(0, 1000))


def test_a_short_prompt_goes_before_a_long_one_and_what_was_done_of_that_counts() -> None:
    seen = Seen()
    seen.submit("long", 4000, 1)
    seen.submit("short", 50, 1, at_s=1.0)
    seen.clock.run(1e6)
    assert seen.first["short"] < 1.2
    both_s = KIND.compute_s(0, 4000) + KIND.compute_s(0, 50)
    assert seen.first["long"] == pytest.approx(both_s, rel=0.01)


def test_a_warm_context_is_not_computed_again_and_the_least_recent_gives_way() -> None:
    seen = Seen()
    seen.submit("a", 4000, 2)
    seen.submit("b", 4000, 2, at_s=100.0)
    seen.submit("a", 4100, 2, at_s=200.0, keeps=4000)
    seen.clock.run(199.0)
    assert list(seen.worker.idle) == ["a", "b"]
    seen.first.clear()
    seen.clock.run(1e6)
    assert seen.first["a"] - 200.0 == pytest.approx(KIND.compute_s(4000, 4100))
    seen.submit("c", 4000, 2, at_s=300.0)
    seen.clock.run(1e6)
    assert "b" not in seen.worker.idle
    assert seen.worker.free_tokens + seen.worker.idle_tokens == pytest.approx(KIND.kv_tokens)


def test_where_memory_is_full_the_last_to_come_gives_way_and_all_end() -> None:
    seen = Seen()
    for number, name in enumerate("abc"):
        seen.submit(name, 3000, 2000, at_s=number * 0.01)
    seen.clock.run(1e6)
    assert set(seen.end) == {"a", "b", "c"}
    assert seen.suspended[0] == "c"
    assert seen.end["a"] < seen.end["c"]
    assert seen.worker.free_tokens + seen.worker.idle_tokens == pytest.approx(KIND.kv_tokens, abs=1.0)


def test_workers_on_the_same_cores_slow_each_other_while_both_compute() -> None:
    import msgspec

    kind = msgspec.structs.replace(KIND, shared=1.0, host_workers=2)
    host, clock = Host(), Clock()
    one, other = Seen(kind, host, clock), Seen(kind, host, clock)
    one.submit("a", 1000, 1)
    other.submit("b", 1000, 1)
    clock.run(1e6)
    assert one.first["a"] == pytest.approx(2 * KIND.compute_s(0, 1000))
    one.submit("alone", 1000, 1, at_s=100.0)
    clock.run(1e6)
    assert one.first["alone"] - 100.0 == pytest.approx(KIND.compute_s(0, 1000))
