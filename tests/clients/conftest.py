"""A server for each session of clients, run by the project's Python whatever Python the clients are in."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """Where the script of ``server.py`` is served, without ``/v1``."""
    python = os.environ.get("TRACEHAUL_PYTHON", sys.executable)
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    command = [python, str(HERE / "server.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
            server.stdin.close()
            assert server.wait(20) == 0
        finally:
            server.kill()
