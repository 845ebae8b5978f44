"""A host's nodes as units of systemd: written, loaded, started, and what it says of them."""

import os
import pwd
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from cluster.hosts.changes import changes
from cluster.hosts.kept import ENVIRONMENT_FILE, Kept, chosen, digests_here, load, node_command, release, save
from cluster.hosts.lives import digest_of
from cluster.hosts.orders import HostReport, NodeCondition, NodeReport, Order, Supervisor, role_of
from cluster.hosts.units import STOP_GRACE_S, TARGET, Site, owner, services_of, unit_files, unit_name
from cluster.rundir import FAULT_EXIT, FENCED_EXIT, ClusterFault, RunDir
from tracehaul import __version__
from tracehaul.model.source import user_cache_dir
from tracehaul.runtime import clock

CALL_TIMEOUT_S = 30.0
PROPERTIES = (
    "Id",
    "ActiveState",
    "SubState",
    "Result",
    "MainPID",
    "NRestarts",
    "ExecMainCode",
    "ExecMainStatus",
    "StateChangeTimestampMonotonic",
)
_KILLED, _DUMPED = 2, 3
"""``CLD_*`` of a process that a signal ended."""


class Systemd:
    """Of the system, or of this user."""

    def __init__(self, run: RunDir, *, of_user: bool) -> None:
        self._run = run
        self._of_user = of_user
        self._kind: Supervisor = "systemd-user" if of_user else "systemd"
        self._scope = ["--user"] if of_user else []
        if of_user:
            config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
            self._folder = config / "systemd" / "user"
        else:
            self._folder = Path("/etc/systemd/system")

    def apply(self, order: Order) -> HostReport:
        """See :class:`cluster.hosts.managers.Manager`."""
        order = msgspec.structs.replace(order, supervisor=self._kind)
        target = self._read(TARGET)
        if (other := owner(target)) not in ("", str(self._run.path)):
            raise ClusterFault(f"{self._folder / TARGET} is of the cluster in {other}: stop that one first")
        save(self._run, Kept(order, self._kind))
        before = self._report(order, services_of(target))
        todo = changes(before, order, digests_here(order))
        self._write(unit_files(order, self._site(order)), services_of(target))
        self._call("stop", [unit_name(name) for name in todo.stop], drain_s=order.plan.config.drain_timeout_s)
        self._call("daemon-reload")
        self._call("enable", [TARGET])
        self._begin("restart", todo.restart, order)
        self._begin("start", todo.start, order)
        self._call("start", [TARGET, "--no-block"])
        return self.status()

    def status(self) -> HostReport:
        kept = load(self._run)
        order = None if kept is None else kept.order
        return self._report(order, services_of(self._read(TARGET)))

    def stop(self, names: Sequence[str]) -> HostReport:
        order = self._ordered()
        drain_s = order.plan.config.drain_timeout_s
        if names:
            self._call("stop", [unit_name(name) for name in chosen(order, names)], drain_s=drain_s)
            return self.status()
        services = services_of(self._read(TARGET))
        self._call("stop", [TARGET, *services], drain_s=drain_s)
        self._call("disable", [TARGET], check=False)
        report = self.status()
        for name in (*services, TARGET):
            (self._folder / name).unlink(missing_ok=True)
        self._call("daemon-reload")
        self._call("reset-failed", services, check=False)
        return report

    def restart(self, names: Sequence[str]) -> HostReport:
        order = self._ordered()
        self._run.create()
        self._begin("restart", chosen(order, names), order)
        return self.status()

    def logs(self, name: str, lines: int) -> list[str]:
        return self._journal(name, lines).splitlines()

    # --- units --------------------------------------------------------------------------------------------

    def _site(self, order: Order) -> Site:
        run, config = self._run, order.plan.config
        user = pwd.getpwuid(run.path.stat().st_uid).pw_name
        writable = [str(user_cache_dir()), *([config.disk_dir] if config.disk_dir else [])]
        read = [*(str(pool.model.path) for pool in order.plan.pools), node_command(run, "")[0]]
        read += filter(None, (config.api.keys_file, config.api.tls_cert, config.api.tls_key))
        return Site(
            run_path=str(run.path),
            release=release(),
            commands={spec.name: node_command(run, spec.name) for spec in order.nodes},
            version=self._version(),
            of_user=self._of_user,
            user="" if user == "root" else user,
            environment_file=str(run.path / ENVIRONMENT_FILE),
            writable=tuple(writable),
            read=tuple(read),
        )

    def _write(self, files: Mapping[str, str], before: Sequence[str]) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                if self._read(name) != text:
                    fresh = self._folder / f"{name}.tmp"
                    fresh.write_text(text)
                    fresh.replace(self._folder / name)
            for name in before:
                if name not in files:
                    (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise ClusterFault(f"cannot write units to {self._folder}: {error.strerror}") from error

    def _read(self, name: str) -> str:
        try:
            return (self._folder / name).read_text()
        except OSError:
            return ""

    def _version(self) -> int:
        words = self._ask(["--version"]).split()
        try:
            return int(words[1])
        except (IndexError, ValueError):
            return 0

    # --- what it says -------------------------------------------------------------------------------------

    def _report(self, order: Order | None, services: Sequence[str]) -> HostReport:
        specs = {spec.name: spec for spec in order.nodes} if order is not None else {}
        said = digests_here(order) if order is not None else {}
        names = dict.fromkeys(
            [*specs, *(name.removeprefix("tracehaul-").removesuffix(".service") for name in services)]
        )
        shown = self._show([unit_name(name) for name in names])
        nodes: list[NodeReport] = []
        for name in names:
            role = specs[name].role if name in specs else role_of(name)
            if role is None:
                continue
            phase = self._run.state(name).phase
            node = node_report(NodeReport(name, role, "stopped"), shown.get(unit_name(name), {}), phase, clock.perf_s())
            if node.pid is not None:
                node = msgspec.structs.replace(node, digest=digest_of(node.pid))
            else:
                line = self._journal(name, 1).strip() if node.state != "stopped" else ""
                node = msgspec.structs.replace(node, digest=said.get(name, ""), last_line=line)
            nodes.append(node)
        host = "" if order is None else order.host
        return HostReport(host, self._kind, tuple(nodes), __version__, release())

    def _show(self, units: Sequence[str]) -> dict[str, dict[str, str]]:
        if not units:
            return {}
        text = self._ask(["show", f"--property={','.join(PROPERTIES)}", *units])
        blocks = [
            dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in text.split("\n\n")
        ]
        return {block["Id"]: block for block in blocks if "Id" in block}

    def _journal(self, node: str, lines: int) -> str:
        """By the name that the unit gives its output: it is there whatever the journal knows of groups."""
        command = ["journalctl", f"--identifier=tracehaul-{node}", f"--lines={lines}"]
        return self._run_command([*command, "--output=cat", "--no-pager", "--quiet"], CALL_TIMEOUT_S, check=False)

    # --- what it is told ----------------------------------------------------------------------------------

    def _ordered(self) -> Order:
        kept = load(self._run)
        if kept is None:
            raise ClusterFault(f"nothing was ordered in {self._run.path}: say what with `tracehaul host apply`")
        return kept.order

    def _begin(self, verb: str, names: Sequence[str], order: Order) -> None:
        """An operator's start counts anew: what died before is forgotten."""
        units = [unit_name(name) for name in names]
        self._call("reset-failed", units, check=False)
        self._call(verb, units, drain_s=order.plan.config.drain_timeout_s)

    def _call(self, verb: str, units: Sequence[str] = (), *, drain_s: float = 0.0, check: bool = True) -> None:
        if units or verb == "daemon-reload":
            timeout_s = CALL_TIMEOUT_S + 3 * (drain_s + STOP_GRACE_S)
            self._run_command(["systemctl", *self._scope, "--quiet", verb, *units], timeout_s, check=check)

    def _ask(self, words: Sequence[str]) -> str:
        return self._run_command(["systemctl", *self._scope, "--no-pager", *words], CALL_TIMEOUT_S, check=True)

    def _run_command(self, command: Sequence[str], timeout_s: float, *, check: bool) -> str:
        try:
            done = subprocess.run(
                command, env=manager_environment(), capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ClusterFault(f"systemd cannot be asked: {error}") from error
        if check and done.returncode:
            why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise ClusterFault(f"systemd refuses ({' '.join(command)}): {why}")
        return done.stdout


def node_report(node: NodeReport, shown: Mapping[str, str], phase: str, now_s: float) -> NodeReport:
    """A node as ``systemctl show`` has its service. ``now_s``: of the clock that systemd calls monotonic."""
    pid = int(shown.get("MainPID") or 0) or None
    status = int(shown.get("ExecMainStatus") or 0)
    how = int(shown.get("ExecMainCode") or 0)
    since_s = int(shown.get("StateChangeTimestampMonotonic") or 0) / 1e6
    exit_code = None if how == 0 else -status if how in (_KILLED, _DUMPED) else status
    return msgspec.structs.replace(
        node,
        state=_state(shown, phase, exit_code),
        pid=pid,
        restarts=int(shown.get("NRestarts") or 0),
        since_s=round(max(0.0, now_s - since_s), 1) if since_s else 0.0,
        exit_code=exit_code,
        phase=phase if pid else "",
    )


def _state(shown: Mapping[str, str], phase: str, exit_code: int | None) -> NodeCondition:
    match shown.get("ActiveState", "inactive"), shown.get("SubState", ""):
        case "activating", "auto-restart" | "auto-restart-queued":
            return "faulty" if exit_code == FAULT_EXIT else "backoff"
        case (("active" | "activating" | "deactivating" | "reloading"), _):
            return "running" if phase in ("ready", "stopping") else "starting"
        case "failed", _ if exit_code == FENCED_EXIT:
            return "fenced"
        case "failed", _:
            return "given up"
        case _:
            return "stopped"


def manager_environment() -> dict[str, str]:
    """This process's, with the place of its user's systemd, which a login over ssh may not say."""
    place = f"/run/user/{os.geteuid()}"
    said = {} if "XDG_RUNTIME_DIR" in os.environ or not Path(place).is_dir() else {"XDG_RUNTIME_DIR": place}
    return os.environ | said
