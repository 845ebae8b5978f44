from hypothesis import given
from hypothesis import strategies as st

from tracehaul.wire.ids import TraceId
from worker.families import AHEAD_MAX_S, Families
from worker.scheduler import Grant, Scheduler


def test_decode_steps_go_first_and_prompts_fill_the_budget() -> None:
    scheduler = Scheduler(chunk_tokens=10, sequences_max=8)
    scheduler.add(1, 100, rank=1)
    scheduler.add(2, 1, rank=2)
    scheduler.add(3, 5, rank=3)
    assert scheduler.plan() == [Grant(2, 1), Grant(1, 9)]


def test_a_prompt_in_progress_finishes_before_the_next_one_starts() -> None:
    scheduler = Scheduler(chunk_tokens=10, sequences_max=8)
    scheduler.add(1, 15, rank=1)
    scheduler.add(2, 15, rank=2)
    (grant,) = scheduler.plan()
    scheduler.computed(grant, sampled=False)
    assert scheduler.plan() == [Grant(1, 5), Grant(2, 5)]


def test_a_budget_smaller_than_the_batch_is_shared_in_turn() -> None:
    scheduler = Scheduler(chunk_tokens=2, sequences_max=8)
    for key in range(3):
        scheduler.add(key, 1, rank=key)
    seen: list[int] = []
    for _ in range(3):
        for grant in scheduler.plan():
            seen.append(grant.key)
            scheduler.computed(grant, sampled=True)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_a_job_that_left_during_the_iteration_stays_away() -> None:
    scheduler = Scheduler(chunk_tokens=10, sequences_max=8)
    scheduler.add(1, 15, rank=1)
    (grant,) = scheduler.plan()
    scheduler.remove(1)
    scheduler.computed(grant, sampled=False)
    assert scheduler.plan() == []


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 20), st.integers(1, 5))
def test_every_prompt_is_computed_once_within_the_limits(pending: list[int], chunk: int, sequences: int) -> None:
    scheduler = Scheduler(chunk_tokens=chunk, sequences_max=sequences)
    left = dict(enumerate(pending))
    for key, tokens in left.items():
        scheduler.add(key, tokens, rank=key)
    for _ in range(sum(pending) + 1):
        grants = scheduler.plan()
        assert sum(grant.tokens for grant in grants) <= chunk
        assert len(grants) <= sequences
        assert len({grant.key for grant in grants}) == len(grants)
        for grant in grants:
            left[grant.key] -= grant.tokens
            if left[grant.key] == 0:
                scheduler.remove(grant.key)
            else:
                scheduler.computed(grant, sampled=False)
    assert all(tokens == 0 for tokens in left.values())


def test_a_prompt_gets_on_however_many_decode() -> None:
    scheduler = Scheduler(chunk_tokens=64, sequences_max=4)
    for key in range(10):
        scheduler.add(key, 1, rank=key)
    scheduler.add(99, 100, rank=99)
    assert scheduler.plan() == [Grant(0, 1), Grant(1, 1), Grant(2, 1), Grant(99, 61)]


def test_a_job_may_want_little_of_each_iteration() -> None:
    scheduler = Scheduler(chunk_tokens=64, sequences_max=4)
    scheduler.add(1, 100, at_most=10, rank=1)
    scheduler.add(2, 100, rank=2)
    assert scheduler.plan() == [Grant(1, 10), Grant(2, 54)]
    scheduler.computed(Grant(1, 10), sampled=False)
    assert scheduler.plan() == [Grant(1, 10), Grant(2, 54)]


def test_prompts_come_by_rank_whenever_they_joined() -> None:
    scheduler = Scheduler(chunk_tokens=10, sequences_max=8)
    scheduler.add(1, 15, rank=4)
    (grant,) = scheduler.plan()
    scheduler.computed(grant, sampled=False)
    scheduler.add(2, 12, rank=5)
    scheduler.add(3, 12, rank=2)
    assert scheduler.plan() == [Grant(3, 10)]
    scheduler.computed(Grant(3, 10), sampled=False)
    assert scheduler.plan() == [Grant(3, 2), Grant(1, 5), Grant(2, 3)]


def test_a_family_is_served_as_one_from_when_its_first_came() -> None:
    families = Families()
    one, other = ("", TraceId("one")), ("", TraceId("other"))
    assert [families.join(one, 5), families.join(other, 6), families.join(one, 7)] == [5, 6, 5]
    assert families.join(("salt", TraceId("one")), 8) == 8, "another tenant's"
    families.leave(one)
    assert families.join(one, 9) == 5
    families.leave(one)
    families.leave(one)
    assert families.join(one, 10) == 10, "nobody was left"
    assert families.join(one, 10 + AHEAD_MAX_S + 3) == 13, "no latecomer passes everybody"
    for family in (one, one, other, ("salt", TraceId("one"))):
        families.leave(family)
    assert len(families) == 0


def test_the_background_gets_nothing_beside_a_prompt() -> None:
    scheduler = Scheduler(chunk_tokens=64, sequences_max=8)
    scheduler.add(1, 1, rank=0, background=True)
    scheduler.add(2, 20, rank=0, background=True)
    scheduler.add(3, 10, rank=9)
    assert scheduler.plan(beside=5) == [Grant(3, 10)]


def test_beside_decode_steps_the_background_decodes_and_computes_a_few_tokens() -> None:
    scheduler = Scheduler(chunk_tokens=64, sequences_max=8)
    scheduler.add(1, 1, rank=0, background=True)
    scheduler.add(2, 20, rank=1, background=True)
    scheduler.add(3, 20, rank=0, background=True)
    scheduler.add(4, 1, rank=9)
    assert scheduler.plan(beside=5) == [Grant(4, 1), Grant(1, 1), Grant(3, 5)]
    assert scheduler.plan(beside=0) == [Grant(4, 1), Grant(1, 1)]


def test_alone_the_background_computes_its_prompts_one_by_one_in_pieces() -> None:
    scheduler = Scheduler(chunk_tokens=64, sequences_max=8)
    scheduler.add(1, 1, rank=0, background=True)
    scheduler.add(2, 50, at_most=30, rank=1, background=True)
    scheduler.add(3, 50, at_most=30, rank=2, background=True)
    assert scheduler.plan() == [Grant(1, 1), Grant(2, 30)]
    scheduler.remove(1)
    scheduler.remove(2)
    assert scheduler.plan() == [Grant(3, 30)]


def test_however_many_decode_a_prompt_of_the_background_gets_on_where_nobody_else_is() -> None:
    scheduler = Scheduler(chunk_tokens=4, sequences_max=4)
    for key in range(6):
        scheduler.add(key, 1, rank=0, background=True)
    scheduler.add(9, 50, rank=1, background=True)
    assert scheduler.plan()[-1] == Grant(9, 1)
