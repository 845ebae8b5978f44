"""A script that serves, beside tests that need other packages than the server does: it prints its port, and ends with
its standard input."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
END_S = 20


@contextmanager
def served(script: Path) -> Iterator[str]:
    """Where it serves, without a slash at the end. It is run by the project's Python whatever Python this is, and has
    to end well."""
    python = os.environ.get("TRACEHAUL_PYTHON", sys.executable)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
            server.stdin.close()
            assert server.wait(END_S) == 0
        finally:
            server.kill()
