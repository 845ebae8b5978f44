"""Every policy under one arena, and the replay that compares them."""

import random
from array import array
from collections.abc import Callable

import pytest

from bench.store.eviction import Recording, policies, replay
from bench.store.eviction_policies import S3Fifo
from kvstore.config import StoreConfig
from kvstore.index.arena import Arena
from kvstore.index.eviction import LeastRecent, Ranked
from tracehaul.wire.blocks import BlockSpec, Pin, Publication, Slot
from tracehaul.wire.ids import BlockHash, Checksum, TraceId

SLOTS = 12
NAMES = list(policies(1, array("d", [1.0])))


def h(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(8, "little"))


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_loses_no_block_of_a_busy_arena(name: str) -> None:
    """Whatever is leased, pinned and released meanwhile: what can go is found, what cannot stays."""
    rng = random.Random(name)
    policy = policies(SLOTS, array("d", [1.0 + n % 4 for n in range(64)]))[name]()
    config = StoreConfig(arena_bytes=SLOTS * 4096, slot_bytes=4096, hard_share_max=0.5, hard_tenant_share_max=0.5)
    arena = Arena(config, policy)
    for at in range(1500):
        now_s = at / 4
        block = rng.randrange(1, 40)
        match rng.randrange(5):
            case 0:
                arena.lease([h(block), h(block // 2)], "r", rng.choice([0.5, 3.0]), now_s)
            case 1:
                kind = rng.choice(["soft", "hard"])
                arena.pin(Pin(TraceId(f"t{block % 3}"), (h(block),), rng.uniform(0.5, 4), kind), now_s)
            case _:
                (slot,) = arena.reserve([BlockSpec(h(block), h(block // 2), 1)], "w", now_s)
                if isinstance(slot, Slot):
                    arena.publish([Publication(h(block), slot.generation, Checksum(0))], "w", now_s)
        arena.check()
    assert arena.evicted > 100


def recording(requests: list[list[int]]) -> Recording:
    return Recording("test", 16, [array("I", request) for request in requests], 1 + max(map(max, requests)))


def test_a_replay_counts_the_leading_run_only() -> None:
    outcome = replay(recording([[0, 1], [0, 1, 2], [0, 3]]), 4, None)
    assert outcome.hits == 3 / 7
    assert 0.5 < outcome.recompute < 4 / 7 + 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_with_room_for_all_no_policy_matters(name: str) -> None:
    recorded = recording([[0, 1], [2, 3], [0, 1, 4], [2, 3, 5], [0, 1, 4]])
    make: Callable[[], object] = policies(6, recorded.costs())[name]
    assert replay(recorded, 6, make()).hits == 7 / 13  # type: ignore[arg-type]


def test_a_scan_does_not_flush_what_s3_fifo_saw_twice() -> None:
    scan = [[n] for n in range(2, 12)]
    recorded = recording([[0], [1], [0], [1], [0], [1], *scan, [0], [1]])
    assert replay(recorded, 4, S3Fifo(4)).hits > replay(recorded, 4, None).hits


def test_groups_have_orders_of_their_own() -> None:
    order = LeastRecent(4, 2)
    for slot in (0, 1, 2):
        order.add(slot, slot % 2, h(slot))
    assert (order.candidate(0), order.candidate(1)) == (0, 1)
    order.touch(0, 0)
    assert order.order(0) == [2, 0]
    order.park(2)
    order.restore(2, 0)
    assert (order.order(0), order.order(1)) == ([2, 0], [1])


def test_ranked_slots_that_left_are_not_found() -> None:
    ranked = Ranked(2)
    for _ in range(500):
        ranked.add(1, 0, 5.0)
        ranked.remove(1)
    ranked.add(1, 1, 5.0)
    ranked.add(2, 0, 7.0)
    assert (ranked.candidate(0), ranked.candidate(1)) == (2, 1)
    assert len(ranked._heaps[0]) < 200
    ranked.check(lambda slot: {1: 5.0, 2: 7.0}[slot])
