"""Hosts that are cut off, die whole, or lose their router, while agents work on others: no request fails."""

import json
import shutil
import time  # noqa: TID251 - a wait for other processes
from pathlib import Path

import pytest

from tests.hosts.conftest import Operator
from tests.hosts.test_fleet import fleet

pytestmark = [pytest.mark.xdist_group("hosts"), pytest.mark.timeout(300)]

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
CUT_S = 20.0
DELAY_S, SLOW_S = 0.05, 10.0
"""Of each way, and for how long agents work over it."""
LOST_S = 12.0
"""After which a host that is cut off is no member any more."""


@pytest.fixture(scope="module")
def three(operator: Operator) -> Operator:
    """A fleet of three hosts; two have routers."""
    both = "{ router = 1, store = 1, decode = 1 }"
    file = fleet(a=both, b=both, c="{ store = 1, decode = 1 }")
    operator.write(file.replace("[[hosts]]", '[security]\ncontrol = "plain"\n[[hosts]]', 1))
    operator.ask("launch")
    return operator


def members(operator: Operator, router: str) -> set[str]:
    """Those that a router takes for well; nobody while it does not answer."""
    if (answer := operator.get(router, "/cluster")) is None:
        return set()
    return {node["info"]["node"] for node in answer if node["health"] == "ready"}


def until(operator: Operator, router: str, wanted: set[str], within_s: float = 30.0) -> None:
    end_s = time.monotonic() + within_s
    while (there := members(operator, router)) != wanted:
        assert time.monotonic() < end_s, there
        time.sleep(0.5)


EVERYBODY = {"store-a-0", "store-b-0", "store-c-0", "decode-a-0", "decode-b-0", "decode-c-0"}
C_ALONE = {"store-c-0", "decode-c-0"}


def test_a_host_that_is_cut_off_for_a_while(three: Operator) -> None:
    with three.agents(6, "a", "b") as seen:
        time.sleep(2.0)
        three.rig.hosts["c"].cut()
        time.sleep(CUT_S)
        assert members(three, "a") == members(three, "b") == EVERYBODY - C_ALONE
        three.rig.hosts["c"].mend()
        until(three, "a", EVERYBODY)
        time.sleep(1.0)
    assert seen["failed"] == []
    assert seen["steps"] > 20


def test_a_router_that_is_killed(three: Operator) -> None:
    pid = str(three.nodes()["router-a-0"]["pid"])
    with three.agents(6, "a", "b") as seen:
        time.sleep(2.0)
        three.rig.hosts["a"].run("kill", "-9", pid)
        time.sleep(2.0)
        assert members(three, "b") == EVERYBODY, "a router's loss costs nobody its membership"
        until(three, "a", EVERYBODY)
        time.sleep(1.0)
    assert seen["failed"] == []
    assert seen["switched"] > 0
    assert three.nodes()["router-a-0"]["restarts"] == 1


@pytest.mark.skipif(shutil.which("nft") is None, reason="nft is not installed")
def test_a_link_that_loses_packets(three: Operator) -> None:
    three.rig.hosts["c"].impair()
    try:
        with three.agents(6, "a", "b") as seen:
            time.sleep(10.0)
    finally:
        three.rig.hosts["c"].unimpair()
    assert seen["failed"] == []
    assert seen["steps"] > 10


def test_a_host_behind_a_slow_link(three: Operator) -> None:
    three.rig.hosts["c"].delay(DELAY_S, jitter_s=DELAY_S / 5)
    try:
        with three.agents(6, "a", "b") as seen:
            end_s = time.monotonic() + SLOW_S
            while time.monotonic() < end_s:
                assert members(three, "a") == members(three, "b") == EVERYBODY, "slow is not lost"
                time.sleep(0.5)
        told = json.loads(three.ask("doctor", "--json"))
    finally:
        three.rig.hosts["c"].undelay()
    assert seen["failed"] == []
    assert seen["steps"] >= 6, "one of each agent"
    slow = [
        float(found["fault"].split(" ms to c and back")[0])
        for found in told["findings"]
        if " ms to c and back" in found["fault"]
    ]
    assert len(slow) == 2, f"as a and b find: {told['findings']}"
    assert all(1e3 * DELAY_S <= ms <= 8e3 * DELAY_S for ms in slow)


def test_a_host_that_is_cut_off_for_good(three: Operator) -> None:
    c = three.rig.hosts["c"]
    with three.agents(6, "a", "b") as seen:
        time.sleep(1.0)
        c.cut()
        until(three, "a", EVERYBODY - C_ALONE)
        until(three, "b", EVERYBODY - C_ALONE)
        assert "ssh c: " in three.ask("launch", code=1), "the others are left as they are"
        assert members(three, "a") == EVERYBODY - C_ALONE
    assert seen["failed"] == []
    c.mend()
    until(three, "a", EVERYBODY)


@pytest.mark.skipif(not FAKETIME.exists(), reason="faketime is not installed")
def test_a_host_whose_clock_is_an_hour_behind(three: Operator) -> None:
    c = three.rig.hosts["c"]
    c.run("sh", "-c", "echo FAKETIME=-1h > /srv/tracehaul/run/environment")
    c.run("sh", "-c", "echo FAKETIME_DONT_FAKE_MONOTONIC=1 >> /srv/tracehaul/run/environment")
    c.run("sh", "-c", f"echo LD_PRELOAD={FAKETIME} >> /srv/tracehaul/run/environment")
    with three.agents(6, "a", "b") as seen:
        three.ask("restart", "store-c-0", "decode-c-0")
        until(three, "a", EVERYBODY)
        before = three.get("a", "/cluster")
        c.run("rm", "/srv/tracehaul/run/environment")
        three.ask("restart", "store-c-0", "decode-c-0")
        until(three, "a", EVERYBODY)
        time.sleep(1.0)
    assert seen["failed"] == []
    started = {node["info"]["node"]: node["info"]["started_s"] for node in before}
    assert started["store-a-0"] - started["store-c-0"] > 1800, "its clock was behind"


def test_a_host_that_dies_whole(three: Operator) -> None:
    with three.agents(6, "a", "b") as seen:
        time.sleep(2.0)
        three.rig.hosts["c"].kill()
        until(three, "a", EVERYBODY - C_ALONE)
        time.sleep(LOST_S)
    assert seen["failed"] == []
    assert seen["steps"] > 20
    three.rig.hosts["c"].start()
    three.rig.wait()
    three.ask("launch")
    until(three, "a", EVERYBODY)


def test_a_full_disk_on_a_host(three: Operator) -> None:
    c = three.rig.hosts["c"]
    three.ask("stop", "c")
    c.run("mount", "-t", "tmpfs", "-o", "size=8m", "run", "/srv/tracehaul/run")
    three.ask("launch")
    c.run("dd", "if=/dev/zero", "of=/srv/tracehaul/run/filler", "bs=1M", check=False)
    assert "100%" in c.run("df", "/srv/tracehaul/run")
    with three.agents(6, "a", "b") as seen:
        time.sleep(6.0)
        assert members(three, "a") == EVERYBODY
    assert seen["failed"] == []
    c.run("rm", "/srv/tracehaul/run/filler")
