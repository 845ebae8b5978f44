"""A store node with a disk tier, killed at random moments while it writes, reads and evicts: nothing that was
published on disk is lost, nothing torn is found. ``python -m bench.faults.killcycles`` does it five hundred times."""

import asyncio
from pathlib import Path

import pytest

from bench.faults.kill_lane import Lane, Tally
from bench.faults.killcycles import restart_s

CYCLES = 10
BLOCKS = 100_000


@pytest.mark.parametrize("file_slots", [48, 1000], ids=["evicting", "roomy"])
def test_killed_at_random_moments(file_slots: int, tmp_path: Path) -> None:
    tally = Tally()
    asyncio.run(Lane("s0", tmp_path, file_slots, tally).run(CYCLES))
    assert tally.violations == 0, "\n".join(tally.complaints)
    assert tally.cycles == CYCLES
    assert tally.owed > CYCLES, "too little was written to mean anything"
    assert len(tally.ends) > 1


def test_a_restart_takes_time_in_proportion_to_its_blocks(tmp_path: Path) -> None:
    """``store.restart_100k`` says in how many seconds. Here: ten times the blocks take less than ten times as long."""
    few, many = (min(asyncio.run(restart_s(tmp_path, blocks))) for blocks in (BLOCKS // 10, BLOCKS))
    assert many < 10 * few
