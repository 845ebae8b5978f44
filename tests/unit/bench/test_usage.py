"""Whose seconds are counted."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bench.common.usage import MARK, usage

SPIN = (
    "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass\nprint(1, flush=True); input()"
)


@pytest.fixture
def spinning() -> Iterator[subprocess.Popen[str]]:
    """A marked shell, whose child has nothing of its environment."""
    command = ["sh", "-c", f"env -i {sys.executable} -c '{SPIN}'; true"]
    process = subprocess.Popen(
        command, env={**os.environ, MARK: "it"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.communicate("\n")


def test_a_child_that_has_lost_the_mark_is_counted(spinning: "subprocess.Popen[str]") -> None:
    assert spinning.stdout is not None
    spinning.stdout.readline()
    assert usage("it").marked >= 0.15
    assert usage("another").marked == 0
