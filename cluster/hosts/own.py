"""Asks our own supervisor, and begins it where there is none."""

import os
import subprocess
import time  # noqa: TID251 - waits for a process outside any loop
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from cluster.config import Role
from cluster.hosts.asks import Apply, Ask, Leave, Restart, Status, Stop, Stranger, ask, supervisor_pid, trusted
from cluster.hosts.kept import idle_nodes, interpreter, load, release, save
from cluster.hosts.logs import last_lines
from cluster.hosts.orders import HostReport, NodeReport, Order, role_of, stages
from cluster.hosts.supervise import GRACE_S, NAME
from cluster.processes import alive, kill, record_of, supervises
from cluster.processes import stop as stop_processes
from cluster.rundir import ClusterFault, RunDir
from tracehaul import __version__
from tracehaul.runtime import clock

BEGIN_TIMEOUT_S = 30.0
STATUS_TIMEOUT_S = 10.0
LEAVE_TIMEOUT_S = 5.0
POLL_S = 0.05
STAGES = 3
"""Of stopping, one after the other."""


class OwnSupervisor:
    """Of one run directory."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._begun: subprocess.Popen[bytes] | None = None

    def apply(self, order: Order) -> HostReport:
        """See :class:`cluster.hosts.managers.Manager`."""
        there = ask(self._run, Status(), timeout_s=STATUS_TIMEOUT_S)
        if there is not None and there.release != release():
            self.leave()
            there = None
        if there is None:
            self._wait_for(self._begun or self.begin())
        return self._asked(Apply(order), self._patience_s(order))

    def status(self) -> HostReport:
        report = ask(self._run, Status(), timeout_s=STATUS_TIMEOUT_S)
        return self._unsupervised() if report is None else report

    def stop(self, names: Sequence[str]) -> HostReport:
        kept = load(self._run)
        order = None if kept is None else kept.order
        report = ask(self._run, Stop(tuple(names)), timeout_s=self._patience_s(order))
        if report is not None:
            return report
        end_nodes(self._run, names, grace_s=self._drain_s(order) + GRACE_S)
        if kept is not None and names:
            save(self._run, msgspec.structs.replace(kept, stopped=tuple(sorted({*kept.stopped, *names}))))
        return self._unsupervised()

    def restart(self, names: Sequence[str]) -> HostReport:
        self._run.create()  # nothing is stopped that could not be started
        if ask(self._run, Status(), timeout_s=STATUS_TIMEOUT_S) is None:
            self._wait_for(self.begin())
        kept = load(self._run)
        return self._asked(Restart(tuple(names)), self._patience_s(None if kept is None else kept.order))

    def logs(self, name: str, lines: int) -> list[str]:
        return last_lines(self._run.log(name), lines)

    def _asked(self, question: Ask, timeout_s: float) -> HostReport:
        report = ask(self._run, question, timeout_s=timeout_s)
        if report is None:
            raise ClusterFault(f"the supervisor of {self._run.path} has ended; why is in {self._run.log(NAME)}")
        return report

    def _drain_s(self, order: Order | None) -> float:
        return order.plan.config.drain_timeout_s if order is not None else 10.0

    def _patience_s(self, order: Order | None) -> float:
        return STAGES * (self._drain_s(order) + GRACE_S + 10.0) + 10.0

    def _unsupervised(self) -> HostReport:
        """What is here although nobody supervises it."""
        kept = load(self._run)
        nodes = {} if kept is None else {node.name: node for node in idle_nodes(kept.order)}
        for record in self._run.records():
            role = role_of(record.name)
            if role is not None and alive(record):
                phase = self._run.state(record.name).phase
                state = "running" if phase == "ready" else "starting"
                nodes[record.name] = NodeReport(record.name, role, state, pid=record.pid, phase=phase)
        host = "" if kept is None else kept.order.host
        return HostReport(host, "none", tuple(nodes.values()), __version__)

    def leave(self) -> bool:
        """Ends the supervisor, by force if it does not answer; nodes live on. Whether there was one.

        Raises:
            Stranger: who has its name is not ours; it is left alone.
        """
        begun, self._begun = self._begun, None
        pid = None
        try:
            pid = supervisor_pid(self._run)
        finally:
            if pid is None and begun is not None:  # it is not so far yet, and has no nodes
                begun.kill()
                begun.wait()
        if pid is None:
            return False
        record = record_of(NAME, pid)
        with suppress(ClusterFault):
            ask(self._run, Leave(), timeout_s=LEAVE_TIMEOUT_S)
            with suppress(ClusterFault):
                self._wait(lambda: not alive(record), "does not leave", LEAVE_TIMEOUT_S)
        if alive(record):
            # Who listens may have given its socket to others, and its number may be somebody else's by now.
            if not supervises(record, self._run.path, trusted(self._run)):
                raise Stranger(f"process {pid} has the name of the supervisor of {self._run.path}, and is none")
            try:
                kill(record)
            except PermissionError as error:
                raise Stranger(f"the supervisor of {self._run.path} is another user's, and frozen") from error
            self._wait(lambda: not alive(record), "does not end")
        return True

    def begin(self) -> subprocess.Popen[bytes]:
        """Starts one, which may not answer yet; it ends by itself if this process ends and has ordered nothing.

        It leads a session and has nothing of ours open, so that it outlives this command and its login."""
        log = self._run.log(NAME)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            output = log.open("ab")
        except OSError:
            output = Path(os.devnull).open("ab")  # noqa: SIM115 - closed below
        command = [interpreter(), "-m", "cluster.hosts.supervise", str(self._run.path)]
        cwd = self._run.path if self._run.path.is_dir() else "/"
        with output:
            self._begun = subprocess.Popen(
                command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        return self._begun

    def _wait_for(self, child: subprocess.Popen[bytes]) -> None:
        """Until that supervisor answers."""

        def answers() -> bool:
            if ask(self._run, Status(), timeout_s=STATUS_TIMEOUT_S) is not None:
                return True
            if child.poll() is not None:
                lines = last_lines(self._run.log(NAME), 1) or [f"exit code {child.returncode}"]
                raise ClusterFault(f"the supervisor of {self._run.path} cannot run: {lines[0]}")
            return False

        self._wait(answers, "does not answer")

    def _wait(self, until: Callable[[], bool], what: str, timeout_s: float = BEGIN_TIMEOUT_S) -> None:
        deadline_s = clock.perf_s() + timeout_s
        while not until():
            if clock.perf_s() > deadline_s:
                raise ClusterFault(f"the supervisor of {self._run.path} {what} for {timeout_s:.0f} s")
            time.sleep(POLL_S)


def end_nodes(run: RunDir, names: Sequence[str] = (), *, grace_s: float) -> tuple[list[str], list[str]]:
    """Ends these of the nodes that run here, all if none is named, where nobody starts them again: those that let work
    in first, those that nobody knows last.

    Returns the names of those that were ended, and of those of them that had to be killed.
    """
    records = {record.name: record for record in run.records() if alive(record)}
    wanted = [name for name in names or records if name in records]
    roles: dict[str, Role] = {name: role for name in wanted if (role := role_of(name)) is not None}
    killed: list[str] = []
    for stage in (*stages(roles), [name for name in wanted if name not in roles]):
        killed += stop_processes([records[name] for name in stage], grace_s=grace_s)
    return wanted, killed
