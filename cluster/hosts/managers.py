"""Who supervises a host's nodes: what the host has, or what was asked for."""

import os
import pwd
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from cluster.hosts.kept import load
from cluster.hosts.orders import Asked, HostReport, Order, Supervisor
from cluster.hosts.own import OwnSupervisor
from cluster.hosts.systemd import Systemd, manager_environment
from cluster.rundir import ClusterFault, RunDir

ASK_TIMEOUT_S = 5.0


class Manager(Protocol):
    """Starts, stops and tells of the nodes of one run directory. All raise ClusterFault."""

    def apply(self, order: Order) -> HostReport:
        """Makes it so: what changed is started, stopped or restarted, the rest is untouched. Returns when what had to
        stop has stopped; what was started may not serve yet."""
        ...

    def status(self) -> HostReport:
        """How they are."""
        ...

    def stop(self, names: Sequence[str]) -> HostReport:
        """Ends these, and nobody starts them again; all if none is named."""
        ...

    def restart(self, names: Sequence[str]) -> HostReport:
        """Ends these and starts them, those that were given up or fenced too; all if none is named."""
        ...

    def logs(self, name: str, lines: int) -> list[str]:
        """The last lines of a node's output."""
        ...


class Facts(NamedTuple):
    """What a host has."""

    booted: bool
    """systemd runs it."""
    root: bool
    user_manager: bool
    """A systemd of this user answers."""
    lingers: bool
    """And stays when the user's last login ends."""


def choose(asked: Asked, facts: Facts) -> Supervisor:
    """Who it shall be.

    Raises:
        ClusterFault: what was asked for is not here.
    """
    match asked:
        case "auto":
            if facts.booted and facts.root:
                return "systemd"
            return "systemd-user" if facts.user_manager and facts.lingers else "own"
        case "systemd":
            if not facts.booted:
                raise ClusterFault("this host is not run by systemd: say supervisor = own, or auto")
            if not facts.root:
                raise ClusterFault("only root may give systemd units: say supervisor = systemd-user or own, or auto")
        case "systemd-user":
            if not facts.user_manager:
                raise ClusterFault("no systemd of this user answers: say supervisor = own, or auto")
            if not facts.lingers:
                raise ClusterFault("this user's systemd ends with its last login: loginctl enable-linger, as root")
        case "own":
            pass
    return asked


def facts() -> Facts:
    """Of this host and this user."""
    try:
        first = Path("/proc/1/comm").read_text().strip()
    except OSError:
        first = ""
    return Facts(
        booted=Path("/run/systemd/system").is_dir() and first == "systemd",
        root=os.geteuid() == 0,
        user_manager=_answers(),
        lingers=Path("/var/lib/systemd/linger", _user()).exists(),
    )


def manager(run: RunDir, supervisor: Supervisor) -> Manager:
    """That one, for this run directory."""
    match supervisor:
        case "own":
            return OwnSupervisor(run)
        case "systemd":
            return Systemd(run, of_user=False)
        case "systemd-user":
            return Systemd(run, of_user=True)


def apply(run: RunDir, order: Order, facts: Facts) -> HostReport:
    """What the order says, by whom it says; if that is another than before, the one before is done first."""
    supervisor = choose(order.supervisor, facts)
    kept = load(run)
    if kept is not None and kept.supervisor != supervisor:
        manager(run, kept.supervisor).stop(())
    return manager(run, supervisor).apply(order)


def present(run: RunDir) -> Manager:
    """Who supervises this run directory now; our own where nobody was ordered to."""
    kept = load(run)
    return manager(run, "own" if kept is None else kept.supervisor)


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _answers() -> bool:
    try:
        done = subprocess.run(
            ["systemctl", "--user", "show-environment"],
            env=manager_environment(),
            capture_output=True,
            timeout=ASK_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
