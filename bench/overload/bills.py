"""``python -m bench.overload.bills``: agents on a live fleet whose workers and router are killed, and what that costs.

A router, a store node and two decode workers whose engine is the fake one, each a process. Every few seconds a worker
or the router is killed with SIGKILL, or both at once, and started again; agents ask again until they are answered.
``bills.error``: by how much all lines of ``tracehaul bill`` together are off the workers' seconds, each from when a
process was ready to join until it was killed or told to end, as a share of these; ``bills.unclaimed``: the share that
is nobody's; ``bills.unbilled``: of what the engines worked, by a clock of their own, the share that no trace is billed
for: it died with a worker that had not told it yet.
"""

import asyncio
import os
import random
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, NamedTuple

import httpx
import typer
from rich.console import Console

from bench.common.report import Result, finish
from bench.overload.bill_node import CLOCK
from cluster.bill import told
from cluster.config import ClusterConfig, PoolConfig
from cluster.launch import free_port
from cluster.plan import NodeSpec, Plan, PoolPlan, save_plan
from cluster.rundir import RunDir
from kvstore.config import StoreConfig
from router.policy.bill_pages import Report
from tracehaul.model.source import resolve
from tracehaul.runtime import clock

PROGRAM = "bench.overload.bill_node"
WORKERS, ROUTER = ("decode-0", "decode-1"), "router-0"
AGENTS, STEPS, FIRST_TOKENS, MORE_TOKENS, ANSWER_TOKENS = 12, 8, 300, 80, 60
ITERATION_S = "0.01"
READY_S, END_S, CALL_S = 120.0, 30.0, 120.0
KILL_EVERY_S = (5.0, 9.0)
AWAY_S = (0.2, 2.0)
"""From a death to the next start."""
AGAIN_S = 0.3


class Life(NamedTuple):
    """One process of one node."""

    name: str
    process: "subprocess.Popen[bytes]"
    clock: Path


class Fleet:
    """The processes, killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.run, port = RunDir(folder / "run"), free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.output = folder / "output"
        self.worked_s = self.there_s = 0.0
        """Of workers' lives that are over."""
        self.kills = 0
        self._folder = folder
        self._lives: dict[str, Life] = {}
        self._count = 0
        self.run.create()
        nodes = [NodeSpec(ROUTER, "router", control_port=free_port()), NodeSpec("store-0", "store")]
        nodes += [NodeSpec(name, "decode", "agents") for name in WORKERS]
        pool = PoolPlan("agents", resolve(), PoolConfig(kv_tokens=16384))
        config = ClusterConfig(transport="tcp", port=port)
        self.plan = Plan(config, (pool,), StoreConfig(256 << 20, 4096), tuple(nodes), name="bills")
        save_plan(self.run, self.plan)

    def start(self, name: str) -> None:
        """A new life of it."""
        self._count += 1
        written = self._folder / f"clock-{self._count}"
        words = [sys.executable, "-m", PROGRAM, "node", name, "--config", str(self.run.path / "cluster.json")]
        with self.output.open("ab") as said:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**os.environ, "FAKE_ITERATION_S": ITERATION_S, "CLOCK": str(written)},
            )
        self._lives[name] = Life(name, process, written)

    def kill(self, name: str) -> None:
        """With SIGKILL."""
        life = self._lives.pop(name)
        life.process.kill()
        life.process.wait()
        self.kills += 1
        self._over(life, clock.wall_s())

    def stop(self, *names: str) -> None:
        """They are told to end, and do."""
        lives = [self._lives.pop(name) for name in names if name in self._lives]
        for life in lives:
            life.process.terminate()
        ended_s = clock.wall_s()
        for life in lives:
            try:
                life.process.wait(END_S)
            except subprocess.TimeoutExpired:
                life.process.kill()
                life.process.wait()
            self._over(life, ended_s)

    def close(self) -> None:
        """Leaves nothing."""
        self.stop(*WORKERS)
        self.stop(ROUTER, "store-0")

    def _over(self, life: Life, ended_s: float) -> None:
        if life.clock.exists():
            began_s, worked_s = CLOCK.unpack(life.clock.read_bytes())
            self.there_s += ended_s - began_s
            self.worked_s += worked_s

    async def ready(self) -> None:
        """Wait until all are there.

        Raises:
            RuntimeError: they are not in time.
        """
        wanted = {"store-0", *WORKERS}
        try:
            async with asyncio.timeout(READY_S), httpx.AsyncClient(trust_env=False) as http:
                while wanted != await _listed(http, self.url):  # noqa: ASYNC110 - it is another process's state
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise RuntimeError("the fleet does not come up: " + self.output.read_text()[-2000:]) from None


async def _listed(http: httpx.AsyncClient, url: str) -> set[str]:
    try:
        nodes = (await http.get(f"{url}/cluster")).json()
    except (httpx.HTTPError, ValueError):
        return set()
    return {node["info"]["node"] for node in nodes if node["health"] == "ready"}


async def _agent(http: httpx.AsyncClient, url: str, name: str, until_s: float) -> int:
    """One trace after the other; returns how many calls were answered."""
    dice, traces, answered = random.Random(name), 0, 0
    while clock.perf_s() < until_s:
        traces += 1
        prompt = [dice.randrange(100, 10_000) for _ in range(FIRST_TOKENS)]
        for _ in range(STEPS):
            said = await _asked(http, url, f"{name}-{traces}", prompt, until_s)
            if said is None:
                break
            answered += 1
            prompt += [dice.randrange(100, 10_000) for _ in range(MORE_TOKENS)]
            await asyncio.sleep(dice.uniform(0.0, 0.4))
    return answered


async def _asked(http: httpx.AsyncClient, url: str, trace: str, prompt: list[int], until_s: float) -> str | None:
    """An answer, however often it has to be asked for; None: it is too late."""
    body = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
    while clock.perf_s() < until_s:
        try:
            answer = await http.post(f"{url}/v1/completions", json=body, headers={"X-Trace-Id": trace})
            if answer.status_code == 200:
                return answer.json()["choices"][0]["text"]
        except (httpx.HTTPError, ValueError):
            pass
        await asyncio.sleep(AGAIN_S)
    return None


async def _killing(fleet: Fleet, until_s: float) -> None:
    dice = random.Random("kills")
    victims = [(WORKERS[0],), (ROUTER,), (WORKERS[1],), (ROUTER, WORKERS[0]), (ROUTER,), (WORKERS[1], ROUTER)]
    at = 0
    while clock.perf_s() < until_s:
        await asyncio.sleep(dice.uniform(*KILL_EVERY_S))
        for name in victims[at % len(victims)]:
            fleet.kill(name)
        await asyncio.sleep(dice.uniform(*AWAY_S))
        for name in victims[at % len(victims)]:
            fleet.start(name)
        await fleet.ready()
        at += 1


async def measure(folder: Path, seconds: float) -> tuple[Fleet, Report, int]:
    """The fleet as it was, what it cost, and how many calls were answered."""
    fleet = Fleet(folder)
    try:
        for name in (ROUTER, "store-0", *WORKERS):
            fleet.start(name)
        await fleet.ready()
        until_s = clock.perf_s() + seconds
        async with httpx.AsyncClient(trust_env=False, timeout=CALL_S) as http, asyncio.TaskGroup() as group:
            agents = [group.create_task(_agent(http, fleet.url, f"a{at}", until_s)) for at in range(AGENTS)]
            await _killing(fleet, until_s)
        fleet.stop(*WORKERS)
        await asyncio.sleep(1.0)
    finally:
        await asyncio.to_thread(fleet.close)
    now = datetime.now(UTC)
    report = await told(fleet.plan, fleet.run, now - timedelta(days=1), now + timedelta(minutes=1))
    return fleet, report, sum(agent.result() for agent in agents)


def main(
    seconds: Annotated[float, typer.Option(help="How long agents run.")] = 120.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
) -> None:
    """Measure, and print it."""
    with tempfile.TemporaryDirectory() as folder:
        fleet, report, answered = asyncio.run(measure(Path(folder), seconds))
    there_s, lines = fleet.there_s, {line.what: line.seconds for line in report.fleet}
    billed_s = sum(row.bill.spent.worker_s for row in report.rows)
    written_s = billed_s + lines["idle"] + lines["lost"]
    results = [
        Result("bills.error", abs(written_s - there_s) / there_s, "share"),
        Result("bills.unclaimed", abs(lines["unclaimed"]) / there_s, "share"),
        Result("bills.unbilled", (fleet.worked_s - billed_s) / fleet.worked_s, "share"),
        Result("bills.busy", fleet.worked_s / there_s, "share"),
        Result("bills.lost", lines["lost"] / there_s, "share"),
        Result("bills.worker_seconds", there_s, "s"),
        Result("bills.seconds", written_s, "s", "bills.worker_seconds", written_s / there_s),
        Result("bills.kills", fleet.kills, "processes"),
        Result("bills.answers", answered, "calls"),
    ]
    finish({"seconds": seconds, "agents": AGENTS}, results, json_path, Console())


if __name__ == "__main__":
    typer.run(main)
