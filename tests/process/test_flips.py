"""A worker of a real cluster changes its role: its contexts are still worth what they were, and no answer is lost."""

import os
import random
import signal
import subprocess
import sys
import threading
import time  # noqa: TID251 - real processes are waited for
from collections.abc import Callable, Sequence

import pytest

from bench.common.fleet import Fleet
from cluster.config import ClusterConfig, NodeCounts
from cluster.launch import free_port
from router.dispatch.config import DispatchConfig
from router.fleet.flips import FlipConfig
from tracehaul.wire.steps import Sampling
from worker.config import WorkerConfig

Alone = Callable[[Sequence[int], Sampling], list[int]]

TRACES = 6
FIRST_TOKENS = 200
NEW_TOKENS = 24
OUTPUT_TOKENS = 8
KNOWN_S = 10.5
"""A router that has started knows by then who is there."""


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    return ClusterConfig(
        dtype="float32",
        port=free_port(),
        nodes=NodeCounts(decode=2),
        dispatch=DispatchConfig(flips=FlipConfig(drain_s=0.2, cooldown_s=0.0)),
        kv_tokens=4096,
        store_bytes=1 << 30,  # all of it fits: 46 KB a token
        worker=WorkerConfig(chunk_tokens=256, local_prefill_tokens=64),
    )


def words(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000, 40_000) for _ in range(count)]


def flip(cluster: Fleet, node: str, role: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", "flip", node, "--to", role, "--run-dir", str(cluster.run.path)]
    end_s = time.monotonic() + 60
    while True:  # a router that is new, or was not run for a while, does not know who is there
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if "does not know yet" not in done.stderr or time.monotonic() > end_s:
            return done
        time.sleep(0.5)


def turned(cluster: Fleet, node: str, role: str) -> None:
    """Once it may: routers refuse for a while after the last change, and while they do not hear of a worker."""
    end_s = time.monotonic() + 60
    while (done := flip(cluster, node, role)).returncode:
        assert time.monotonic() < end_s, done.stderr
        time.sleep(1)


def role_of(cluster: Fleet, node: str) -> str:
    return next(each["info"]["role"] for each in cluster.nodes() if each["info"]["node"] == node)


def round_of(cluster: Fleet, prompts: dict[str, list[int]], seed: int) -> float:
    """One step of each trace; returns which share of what each trace had was not computed again."""
    had = cached = 0
    for at, (trace, prompt) in enumerate(prompts.items()):
        before = len(prompt)
        prompt += words(NEW_TOKENS if before else FIRST_TOKENS, 100 * seed + at)
        step = cluster.step(trace, prompt, OUTPUT_TOKENS, ignore_eos=True)
        had += max(0, before - 1)  # nobody has the KV of the last token
        cached += step.cached_tokens
        prompt += step.tokens
    return cached / had if had else 0.0


@pytest.mark.slow
def test_hits_before_and_after_a_flip_are_the_same(cluster: Fleet, alone: Alone) -> None:
    prompts: dict[str, list[int]] = {f"t{n}": [] for n in range(TRACES)}
    round_of(cluster, prompts, 0)
    before = round_of(cluster, prompts, 1)
    time.sleep(KNOWN_S)
    done = flip(cluster, "decode-1", "prefill")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("decode-1 is a prefill worker, after ")
    assert role_of(cluster, "decode-1") == "prefill"
    after = round_of(cluster, prompts, 2)
    assert before > 0.9
    assert after >= 0.97 * before
    # It computes prompts now, and to the token what any engine would.
    for n in range(4):
        prompt = words(300, 1000 + n)
        step = cluster.step(f"new-{n}", prompt, OUTPUT_TOKENS, ignore_eos=True)
        assert step.tokens == alone(prompt, Sampling(max_tokens=OUTPUT_TOKENS, temperature=0.0))
    turned(cluster, "decode-1", "decode")
    again = round_of(cluster, prompts, 3)
    assert again >= 0.97 * before
    assert "last prefill worker" in flip(cluster, "prefill-0", "decode").stderr


@pytest.mark.slow
def test_a_step_that_runs_goes_on_elsewhere(cluster: Fleet, alone: Alone) -> None:
    prompt = words(100, 7)
    told: list[int] = []

    def ask() -> None:
        for chunk in cluster.chunks("runs", prompt, 200, "decode-1", ignore_eos=True):
            for choice in chunk["choices"]:
                told.extend(choice.get("token_ids") or [])

    asking = threading.Thread(target=ask)
    asking.start()
    while len(told) < 5:
        time.sleep(0.02)
    done = flip(cluster, "decode-1", "prefill")
    assert done.returncode == 0, done.stderr
    asking.join(60)
    assert told == alone(prompt, Sampling(max_tokens=200, temperature=0.0))
    turned(cluster, "decode-1", "decode")


@pytest.mark.slow
def test_one_that_is_killed_meanwhile_comes_back_with_the_role_of_the_config(cluster: Fleet) -> None:
    turned(cluster, "decode-1", "prefill")
    os.kill(cluster.pids()["decode-1"], signal.SIGKILL)
    cluster.restart(["decode-1"])
    assert role_of(cluster, "decode-1") == "decode"
    assert cluster.step("back", words(50, 9), OUTPUT_TOKENS, "decode-1", ignore_eos=True).finish_reason == "length"
