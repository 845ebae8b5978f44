"""Units under a real systemd, of a user and of a whole small machine, in namespaces that only root may make."""

import os
import shutil
import signal
import subprocess
from collections.abc import Generator
from pathlib import Path

import msgspec
import pytest

from cluster.hosts.orders import HostReport, Order
from cluster.hosts.units import unit_name
from cluster.rundir import RunDir
from tests.process.host_nodes import Host, by_name, encoded, make_order, pids
from tests.waiting import wait_until

SCRIPT = Path(__file__).with_name("systemd_site.sh")
ROOT = Path(__file__).parents[2]
NAMESPACES = ("--mount", "--pid", "--cgroup")


class Site(Host):
    """A host whose commands run in the namespaces of its systemd."""

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__(folder / "run")
        self._folder = folder
        self.supervisor = {"user": "systemd-user", "system": "systemd"}[kind]
        self.units = f"{folder}/config/systemd/user" if kind == "user" else "/etc/systemd/system"
        self._scope = ["--user"] if kind == "user" else []
        self._environment = dict(os.environ)
        if kind == "user":
            self._environment |= {"XDG_RUNTIME_DIR": "/run/user/0", "XDG_CONFIG_HOME": f"{folder}/config"}
        self.path.mkdir()
        (self.path / "environment").write_text(f"PYTHONPATH={ROOT}\n")
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        self._parent = subprocess.Popen([*command, "bash", str(SCRIPT), kind, str(folder)], start_new_session=True)

    def begin(self) -> bool:
        """Whether there can be such a site here."""
        children = Path(f"/proc/{self._parent.pid}/task/{self._parent.pid}/children")
        try:
            wait_until(lambda: self._parent.poll() is not None or bool(children.read_text().split()))
            first = children.read_text().split()[0]
        except (OSError, IndexError):
            return False
        self.prefix = ["nsenter", f"--target={first}", *NAMESPACES]

        def answers() -> bool:
            state = self.shell(f"systemctl {' '.join(self._scope)} is-system-running").strip()
            return self._parent.poll() is not None or state in ("running", "degraded")

        wait_until(answers)
        return self._parent.poll() is None

    def shell(self, line: str) -> str:
        command = [*self.prefix, "bash", "-c", line]
        return subprocess.run(command, capture_output=True, text=True, env=self._environment, timeout=30).stdout

    def shows(self, name: str) -> str:
        """Of a node's service, what systemd calls active."""
        return self.shell(f"systemctl {' '.join(self._scope)} show --value -p ActiveState {unit_name(name)}").strip()

    def close(self) -> None:
        self._parent.kill()  # and so all in its namespaces
        self._parent.wait()


@pytest.fixture(params=["user", "system"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Site, None, None]:
    if os.geteuid() != 0 or not Path("/lib/systemd/systemd").exists() or shutil.which("nsenter") is None:
        pytest.skip("needs root, systemd and nsenter")
    site = Site(tmp_path, request.param)
    try:
        if not site.begin():
            pytest.skip("no namespaces can be made here")
        yield site
    finally:
        site.close()


def test_units_run_the_nodes(site: Site):
    """Over an hour of a fleet, in a minute: started, killed, given up, mended, fenced, changed, stopped."""
    order = msgspec.structs.replace(make_order(2, "elsewhere"), supervisor="auto")
    order = msgspec.structs.replace(order, restarts=msgspec.structs.replace(order.restarts, deaths_max=1))

    def apply(order: Order) -> HostReport:
        return site.ask("apply", given=encoded(order))

    def waits(name: str, shown: str = "active") -> None:
        """Until it tries to join its router, or has failed: looked for by what costs little."""
        told = RunDir(site.path)
        wait_until(lambda: site.shows(name) == shown and (shown == "failed" or told.state(name).phase == "joining"))

    apply(order)
    waits("store-0")
    waits("store-1")
    first = site.ask("status")
    assert first.supervisor == site.supervisor
    assert [(node.state, node.phase) for node in first.nodes] == [("starting", "joining")] * 2
    pid = first.nodes[0].pid
    assert "NoNewPrivs:\t1" in site.shell(f"cat /proc/{pid}/status")
    if site.supervisor == "systemd":
        mounts = site.shell(f"cat /proc/{pid}/mounts").splitlines()
        assert any(line.split()[1] == "/" and line.split()[3].startswith("ro") for line in mounts)
        assert any(line.split()[1] == str(site.path) and line.split()[3].startswith("rw") for line in mounts)

    site.shell(f"kill -9 {pid}")
    wait_until(lambda: not (site.path / "state" / "store-0.json").exists())
    waits("store-0")
    back = by_name(site.ask("status"))["store-0"]
    assert (back.restarts, back.pid != pid) == (1, True)
    site.shell(f"kill -9 {back.pid}")
    waits("store-0", "failed")
    told = by_name(site.ask("status"))["store-0"]
    assert (told.state, told.exit_code) == ("given up", -signal.SIGKILL)
    assert by_name(apply(order))["store-0"].state == "starting"

    # A node that says that another has its name now is left alone, however often the same is ordered.
    folder = f"{site.units}/{unit_name('store-1')}.d"
    site.shell(
        f"mkdir -p {folder}; "
        f"printf '[Service]\nExecStart=\nExecStart=/bin/sh -c \"sleep 0.5; exit 4\"\n' > {folder}/x.conf"
    )
    apply(order)
    site.ask("restart", "store-1")
    waits("store-1", "failed")
    there = apply(order)
    assert by_name(there)["store-1"].state == "fenced"

    plan = order.plan
    moved = msgspec.structs.replace(plan.nodes[1], listen="127.0.0.2", address="127.0.0.2")
    after = apply(msgspec.structs.replace(order, plan=msgspec.structs.replace(plan, nodes=(plan.nodes[0], moved))))
    assert list(pids(after)) == ["store-0"]
    assert pids(after)["store-0"] != pids(there)["store-0"]
    waits("store-0")

    stopped = site.ask("stop")
    assert by_name(stopped)["store-0"].pid is None
    assert msgspec.json.decode(site.call("logs", "store-0", "-n", "1").stdout)["lines"][0].endswith("ended")
    assert site.shell(f"ls {site.units} | grep '^tracehaul.*\\.service$'") == ""
