"""The paged pool's memory as NIXL sees it: registered once, a block is one descriptor, on a GPU as on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_block_moves_between_pools_as_one_piece(device: str) -> None:
    script = Path(__file__).with_name("paged_over_nixl.py")
    command = [sys.executable, str(script), device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout.split()[-2:] == ["DONE", "same"], done.stdout + done.stderr[-2000:]
