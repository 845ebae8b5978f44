"""Databases that are full, read-only, frozen or gone under a router that runs: it serves on as if nothing were, says
so, counts what is not written down, and writes it once it can."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.durable.killed import Routers, routers
from tests.postgres import Postgres, postgres
from tests.process.database_faults import Agent, gauge, steps, work
from tests.waiting import wait_until

pytestmark = pytest.mark.xdist_group("postgres")

CALM_S, FAULT_S = 3.0, 14.0
"""Transactions are given up after ten seconds."""
SLOW_S = 1.8
"""A step of a trace that is here begins sooner, on any machine that is not far too busy, and so does each token: who
waits for the database waits for two seconds at least."""


def faulty(cluster: Routers, breaks: Callable[[], None], heals: Callable[[], None], *, begin_s: float = SLOW_S) -> None:
    """Agents work while the database breaks, is broken and heals; then the router is killed, and knows it all.

    ``begin_s``: what the first step may take of a trace that begins meanwhile.
    """
    url = cluster.urls[0]
    run = len(cluster.output.read_bytes())  # traces of tests before are there still
    agents = [Agent(url, f"calm-{run}-{at}") for at in range(4)]
    work(agents, CALM_S)
    wait_until(lambda: gauge(url, "tracehaul_journal_behind") == 0)
    calm = [agent.steps for agent in agents]
    before = cluster.output.read_text().count("the journal of traces stands still")
    breaks()
    try:
        fresh = [Agent(url, f"fresh-{run}-{at}") for at in range(2)]
        work([*agents, *fresh], FAULT_S)
        assert gauge(url, "tracehaul_journal_failing") == 1
        assert gauge(url, "tracehaul_journal_behind") >= len(agents)
    finally:
        heals()
    for agent, count in zip(agents, calm, strict=True):
        assert agent.steps > count + 3
        assert max(agent.first_s[count:]) < SLOW_S, "a step waited for the database"
        assert max(agent.gaps_s[count:]) < SLOW_S, "a token waited for the database"
    for agent in fresh:
        assert agent.first_s[0] < begin_s
        assert max(*agent.first_s[1:], *agent.gaps_s) < SLOW_S
    wait_until(lambda: gauge(url, "tracehaul_journal_failing") == 0, 30.0)
    wait_until(lambda: gauge(url, "tracehaul_journal_behind") == 0)
    assert cluster.output.read_text().count("the journal of traces stands still") == before + 1
    cluster.kill(cluster.names[0])
    cluster.start(cluster.names[0])
    asyncio.run(cluster.known())
    for agent in [*agents, *fresh]:
        assert steps(url, agent.name) == agent.steps


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    with routers(tmp_path, 1, "") as cluster:
        folder = tmp_path / cluster.names[0] / "records"
        folder.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], capture_output=True
        ).returncode:
            pytest.skip("only root can mount a disk that is small")
        try:
            asyncio.run(cluster.ready())

            def sized(size: int) -> None:
                subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

            def breaks() -> None:
                used = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
                sized(used + 8192)

            faulty(cluster, breaks, lambda: sized(32 << 20))
        finally:
            cluster.end()
            subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(database: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routers]:
    with routers(tmp_path_factory.mktemp("routers"), 1, database.create("faults")) as cluster:
        asyncio.run(cluster.ready())
        yield cluster


def test_a_database_that_is_read_only(cluster: Routers, database: Postgres) -> None:
    def readonly(value: str) -> None:
        database.say(f"ALTER ROLE tracehaul SET default_transaction_read_only = {value}", writes=True)
        database.say("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")

    faulty(cluster, lambda: readonly("on"), lambda: readonly("off"))


def test_a_database_that_is_frozen(cluster: Routers, database: Postgres) -> None:
    def signalled(number: int) -> None:
        for pid in database.processes():
            os.kill(pid, number)

    # Of the first calls of traces that nobody here knows some have waited for it.
    faulty(cluster, lambda: signalled(signal.SIGSTOP), lambda: signalled(signal.SIGCONT), begin_s=4.0)


def test_a_database_that_is_gone_and_comes_back(cluster: Routers, database: Postgres) -> None:
    faulty(cluster, database.stop, database.start)
