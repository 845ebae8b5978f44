"""What a plan shows of what would change, where the hosts' releases differ."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from cluster.config import ClusterConfig, PoolConfig
from cluster.fleet import tables
from cluster.fleet.config import HostConfig, HostNodes
from cluster.fleet.connection import Done
from cluster.fleet.facts import Seen
from cluster.fleet.opened import Opened
from cluster.fleet.operations import Ready, changes_of
from cluster.fleet.placing import place
from cluster.fleet.survey import Hand, Survey
from cluster.hosts.changes import Changes
from cluster.hosts.orders import HostReport
from cluster.plan import Plan, PoolPlan
from kvstore.config import StoreConfig
from tests.unit.cluster.fleet.test_findings import GOOD
from tracehaul.model.source import ModelSource

REFUSED = """\
Usage: tracehaul host apply [OPTIONS]
Try 'tracehaul host apply -h' for help.
╭─ Error ────────────────────────────╮
│ No such option: --dry-run          │
╰────────────────────────────────────╯
"""


class Answers:
    """A host that answers whatever it is asked alike."""

    def __init__(self, done: Done) -> None:
        self.done = done

    async def run(self, command, stdin=b"", timeout_s=60.0) -> Done:
        return self.done

    @asynccontextmanager
    async def hold(self, command, timeout_s=30.0):
        yield b""

    async def address(self) -> str:
        return ""


def test_a_host_whose_release_does_not_know_the_question_is_told_and_the_others_are_shown() -> None:
    hosts = tuple(
        HostConfig(name, HostNodes(router=1, store=1), address=f"10.0.0.{at}") for at, name in enumerate("ab")
    )
    config = ClusterConfig(hosts=hosts)
    pool = PoolPlan("", ModelSource("m", Path("/m"), "hf", "llama"), PoolConfig(dtype="float32"))
    plan = Plan(config, (pool,), StoreConfig(arena_bytes=1 << 20, slot_bytes=4096), place(config, {}))
    would = msgspec.json.encode(Changes(restart=("store-b-0",)))
    dones = {"a": Done(2, b"", REFUSED.encode()), "b": Done(0, would, b"")}
    fleet = Opened(config, [Hand(host, Answers(dones[host.name])) for host in hosts])
    seen = {name: Seen(GOOD, 0.0, 0.0) for name in dones}
    reports = {name: HostReport(name, "own", (), "") for name in dones}
    found = asyncio.run(changes_of(fleet, Ready(plan, Survey(seen, reports, ()), {"": "d"})))
    assert tables.changes(plan, found) == [
        "? a does not say what would change there: No such option: --dry-run",
        "~ store-b-0 is started anew on b: something that it reads has changed",
    ]
