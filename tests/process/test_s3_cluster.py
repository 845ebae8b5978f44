"""A cluster whose store node keeps its blocks in a bucket: killed, and on another machine, it serves them again."""

import os
import random
import signal
from collections.abc import Callable

import pytest
from rich.console import Console

from bench.common.fleet import fleet
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from tests.waiting import wait_until

PROMPT_TOKENS = 640
BLOCKS = PROMPT_TOKENS // 32 - 1


@pytest.mark.parametrize("disk_bytes", [0, 64 << 20], ids=["below-memory", "below-a-disk"])
def test_a_killed_store_node_finds_its_blocks_in_the_bucket(
    disk_bytes: int, s3_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    config = ClusterConfig(
        dtype="float32",
        port=free_port(),
        nodes=NodeCounts(prefill=0),
        kv_tokens=2048,
        store_bytes=64 << 20,
        disk_bytes=disk_bytes,
        s3_url=s3_url(),
        s3_bytes=256 << 20,
    )
    dice = random.Random(1)
    prompt = [dice.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)]
    with fleet(config, Console(quiet=True)) as running:
        before = running.step("t", prompt, 4)
        wait_until(lambda: running.metric("store-0", "tracehaul_s3_stored_blocks_total") >= BLOCKS, 30.0)
        assert running.metric("store-0", "tracehaul_node_s3_blocks") >= BLOCKS
        os.kill(running.pids()["store-0"], signal.SIGKILL)
        for path in running.run.path.glob("disk/*"):
            path.unlink()  # the machine's disk is gone with it
        running.restart(["store-0", "decode-0"])
        wait_until(lambda: running.metric("store-0", "tracehaul_node_s3_blocks") >= BLOCKS, 30.0)
        after = running.step("t", prompt, 4)
        assert after.tokens == before.tokens
        assert after.cached_tokens >= PROMPT_TOKENS - 64
        assert running.metric("store-0", "tracehaul_s3_loaded_blocks_total") >= BLOCKS
        assert running.metric("store-0", "tracehaul_s3_get_requests_total") >= BLOCKS
        assert running.metric("store-0", "tracehaul_s3_corrupt_blocks_total") == 0
