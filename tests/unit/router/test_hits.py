"""Where tokens were lost, as a table."""

import msgspec
import pytest

from router.traces.hits import Changed, Expected, Hits, Outcome, attribute, together
from router.traces.rows import named, packed, unpacked

BLOCK = 16


def expected(
    theoretical: int = 100, *, published: int = 100, indexed: int = 96, warm: int = 0, chosen: int | None = None
) -> Expected:
    return Expected(
        theoretical, published, indexed, warm, max(indexed, warm) if chosen is None else chosen, block_tokens=BLOCK
    )


@pytest.mark.parametrize(
    ("before", "after", "losses"),
    [
        (expected(), Outcome(100), {}),
        (expected(0, published=0, indexed=0), Outcome(0), {}),
        (expected(0, published=0, indexed=32), Outcome(32), {}),  # what another trace left
        (expected(), Outcome(96), {"partial_block": 4}),
        (expected(indexed=0), Outcome(0), {"evicted": 100}),
        (expected(indexed=32), Outcome(32), {"evicted": 68}),
        (expected(indexed=32, published=64), Outcome(32), {"evicted": 32, "never_published": 36}),
        (expected(indexed=0), Outcome(0, home_lost=True), {"store_lost": 100}),
        (expected(indexed=0, published=64), Outcome(0, warm_gone=True), {"evicted": 64, "worker_gone": 36}),
        (expected(warm=100), Outcome(96 - BLOCK), {"evicted": 20}),  # its worker gave it up, the store had no tail
        (expected(warm=100, chosen=96), Outcome(64), {"index_stale": 32, "placement": 4}),
        (expected(warm=100, indexed=0, chosen=0), Outcome(0), {"placement": 100}),
        (expected(), Outcome(64), {"index_stale": 32, "evicted": 4}),
        (expected(), Outcome(64, missed_blocks=2), {"missed": 32, "evicted": 4}),
        (expected(), Outcome(0, prefill_failed=True, missed_blocks=2), {"prefill_failed": 96, "evicted": 4}),
        (expected(warm=100), Outcome(0, worker_failed=True), {"worker_failed": 100}),
        (expected(indexed=128, chosen=128), Outcome(64), {"index_stale": 36}),  # beyond what the trace had: no loss
    ],
)
def test_each_loss_has_its_reason(before: Expected, after: Outcome, losses: dict[str, int]) -> None:
    hits = attribute(before, after)
    assert hits.losses == losses
    assert sum(losses.values()) == max(0, before.theoretical - after.delivered)
    assert (hits.theoretical, hits.indexed) == (before.theoretical, before.indexed)
    assert (hits.chosen, hits.delivered) == (before.chosen, after.delivered)


def test_hits_add_up() -> None:
    assert together([Hits(5, 4, 3, 2, {"missed": 3}), Hits(1, 1, 1, 0, {"missed": 1})]) == Hits(
        6, 5, 4, 2, {"missed": 4}
    )
    assert together([]) == Hits()


def test_what_was_changed_is_kept_with_a_step() -> None:
    told = Hits(9, 8, 7, 6, {"evicted": 3}, Changed("messages", 4, 30, 20, 10))
    for hits in (told, Hits()):
        row = unpacked(packed(hits))
        assert msgspec.convert(named(Hits, row), Hits) == hits
    assert together([Hits(), told]).changed == told.changed
