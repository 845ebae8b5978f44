"""Fifty runs of the whole cluster under faults; and the same seed is the same run in every process."""

import functools
import logging
import os
import subprocess
import sys

import pytest

from sim.__main__ import replay
from sim.run import simulate
from sim.shape import MIX

TRACES = MIX.traces
CHUNK = 10
TELLING = (*range(20, 50), 75, 78)
"""Seeds that reach every way of coping between them; the last two restart a store just after a hard pin."""
TELLING_CHUNKS = {seed // CHUNK for seed in TELLING}
TOGETHER = pytest.mark.xdist_group("telling-seeds")
"""One process runs them once."""

pytestmark = pytest.mark.timeout(900)  # ten runs or more in each test, all of it work


@functools.cache
def outcome(seed):
    return simulate(seed, mix=MIX)


@pytest.fixture(autouse=True)
def quiet():
    """Warnings are what faults are for; thousands of them only slow a run down."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    yield
    root.setLevel(level)


@pytest.mark.parametrize("chunk", [pytest.param(n, marks=[TOGETHER] if n in TELLING_CHUNKS else []) for n in range(5)])
def test_nothing_is_violated_under_faults(chunk):
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        result = outcome(seed)
        assert not result.findings, "\n".join([replay(seed, TRACES), *result.findings])
        assert result.finished + result.hung_up >= TRACES * MIX.steps_min


@pytest.mark.parametrize("seed", [16, 32, 342, 319, 467, 126, 133])
def test_seeds_that_found_bugs(seed):
    """16: a moved step's own work counted as cached; 32: a lost last message; 342, 319, 467: a sequence grew while its
    blocks were copied out; 126, 133: what was written of a trace had children that were no more."""
    result = simulate(seed)
    assert not result.findings, "\n".join([replay(seed, MIX.traces), *result.findings])


def test_a_calm_run_fails_nothing_and_reuses_most_of_its_prompts():
    result = simulate(0)
    assert not result.findings, "\n".join([replay(0, MIX.traces), *result.findings])
    assert result.failed == 0
    assert result.hung_up > 0
    assert result.cached_tokens > 0.6 * result.prompt_tokens
    assert result.counts["store.published"] > 0


@TOGETHER
def test_the_faults_reach_every_way_of_coping():
    """A simulator that never gets anywhere near trouble passes everything."""
    total: dict[str, int] = {}
    for seed in TELLING:
        for name, count in outcome(seed).counts.items():
            total[name] = total.get(name, 0) + count
    for name in (
        "store.evicted",
        "store.full",
        "store.fenced",
        "store.corrupt_writes",
        "store.corrupt_held",
        "client.misses.absent",
        "client.misses.lost",
        "client.misses.timeout",
        "client.misses.corrupt",
        "store.waits",
        "store.passed_on",
        "client.puts.present",
        "client.failovers",
        "worker.evicted_sequences",
        "router.steps_aborted",
        "router.steps_moved",
        "router.prefill_fallbacks",
        "router.traces_refused",
        "flips.flipped",
        "flips.refused",
        "store.waits",
        "store.pins_refused",
        "tier.corrupt",
        "tier.failed",
        "tier.evicted",
        "tier.recovered",
        "tier.scrubbed",
        "tiering.demoted",
        "tiering.promoted",
        "tiering.promote_failed",
        "tiering.promote_refused",
        "tiering.promote_late",
        "world.zombies",
        "world.audited",
        "world.pins_recovered",
        "copies.blocks",
    ):
        assert total.get(name, 0) > 0, f"{name} never happened"


def _digest(seed, hash_seed):
    code = f"""
import msgspec
from sim.run import simulate
from sim.shape import MIX
print(simulate({seed}, mix=msgspec.structs.replace(MIX, traces={TRACES})).digest)
"""
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True, text=True).stdout


@pytest.mark.parametrize("seed", [7, pytest.param(21, marks=pytest.mark.slow)])
def test_the_same_seed_is_the_same_run_in_every_process(seed):
    digests = {_digest(seed, hash_seed) for hash_seed in ("0", "1", "4242")}
    assert len(digests) == 1


def test_the_command_replays_a_seed():
    command = [sys.executable, "-m", "sim", "--seed", "1", "--traces", "2", "--verbose"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "digest" in done.stdout
    assert "1 of 1 seeds passed" in done.stdout
