"""Nodes of the previous release and of this one in one cluster: KV moves between them, and no request fails."""

import contextlib
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.process.releases import ROUTERS, STORES, WORKERS, Mixed, Trace, working

PREVIOUS = "496ce7654f05cd033b26ba552150699bf1ab95fe"
"""The release before this one: the first commit of which a cluster's nodes join with a version of their messages. At a
release it becomes that release's commit, in the commit that follows it."""
ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the previous release."""
    tree = tmp_path_factory.mktemp("previous")
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", PREVIOUS], capture_output=True, check=False)
    if archive.returncode != 0:
        pytest.skip(f"the previous release is not in this clone's history: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    return tree


@contextlib.contextmanager
def cluster(folder: Path, old: Path, transport: str) -> Generator[Mixed, None, None]:
    made = Mixed(folder, old, transport)
    try:
        yield made
    finally:
        made.end()


def try_out(mixed: Mixed, name: str) -> None:
    """A trace whose every step pulls what a worker of the other name has computed."""
    for router in mixed.routers:
        trace = Trace(mixed, f"{name}-{router}", [router])
        trace.step("decode-0")
        for decode in ("decode-1", "decode-0"):
            before = trace.pulled
            trace.step(decode)
            assert trace.pulled > before, f"{name}: {decode} has pulled nothing"


def test_a_rolling_upgrade_fails_no_request(old: Path, tmp_path: Path) -> None:
    """On the way stores are newer than workers, and workers than routers; then stores and a worker are older."""
    order = [
        *((name, ROOT) for name in (*STORES, *WORKERS, *ROUTERS)),
        *((name, old) for name in (*STORES, "decode-1")),
    ]
    with cluster(tmp_path, old, "tcp") as mixed:
        mixed.start(old, *ROUTERS, *STORES, *WORKERS)
        with working(mixed, 2) as work:
            for name, tree in order:
                before = work.steps
                mixed.start(tree, name)
                try_out(mixed, f"{name}-{'old' if tree == old else 'new'}")
                assert work.steps > before
        assert work.failed == []


def test_shared_memory_of_one_release_is_read_by_the_other(old: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, old, "shm") as mixed:
        mixed.start(old, "router-0", "store-0", "decode-0", ready=False)
        mixed.start(ROOT, "store-1", "decode-1")
        for at in range(4):  # their homes are either store
            try_out(mixed, f"shared-{at}")
