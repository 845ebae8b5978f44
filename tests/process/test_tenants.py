"""Tenants through the HTTP API: one can neither read what another computed, nor drive it out below its quota."""

import random

import pytest

from bench.common.fleet import Fleet
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from worker.config import WorkerConfig

BLOCK_BYTES = 32 * 23040
PROMPT_TOKENS = 320
BLOCKS = PROMPT_TOKENS // 32
QUOTA_BLOCKS = BLOCKS + 2

pytestmark = pytest.mark.xdist_group("tenants")


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    return ClusterConfig(
        port=free_port(),
        nodes=NodeCounts(prefill=0),
        kv_tokens=512,  # room for one sequence: what the worker itself keeps is gone with the next
        store_bytes=26 * BLOCK_BYTES,
        quota_bytes={"acme": QUOTA_BLOCKS * BLOCK_BYTES},
        worker=WorkerConfig(headroom_tokens=32),
    )


def prompt(seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)]


def cached(cluster: Fleet, salt: str, seed: int) -> int:
    """Prompt tokens that did not have to be computed; each call is a trace of its own."""
    cached.calls += 1  # type: ignore[attr-defined]
    return cluster.step(f"{salt}-{cached.calls}", prompt(seed), 2, cache_salt=salt).cached_tokens  # type: ignore[attr-defined]


cached.calls = 0  # type: ignore[attr-defined]


def test_a_tenant_neither_reads_nor_evicts_another_within_its_quota(cluster: Fleet) -> None:
    def flood(salt: str, seed: int) -> None:
        for other in range(seed, seed + 4):
            assert cached(cluster, salt, other) == 0

    assert cached(cluster, "acme", 1) == 0
    assert cached(cluster, "other", 1) == 0, "the same prompt of another tenant is another's"
    flood("other", 100)
    assert cached(cluster, "acme", 1) >= (BLOCKS - 1) * 32, "within its quota it loses nothing"
    assert cached(cluster, "other", 1) == 0, "the others share what is left, and it was not enough"
    flood("third", 200)
    assert cached(cluster, "acme", 1) >= (BLOCKS - 1) * 32
    assert cluster.metric("store-0", "tracehaul_store_full_total") == 0, "nobody was refused"
