"""A cluster's run directory: what runs, how far each node has come, and where the logs are.

Layout: ``cluster.json`` (the plan that every node reads), ``processes/NAME.json`` (who to stop), ``state/NAME.json``
(written by the node itself), ``logs/NAME.log``, ``operator.key`` (an API key for the commands that are run here). A
process is named by its pid *and* its start time, so that a pid that the kernel has given to somebody else is never
signalled.
"""

import fcntl
import os
import select
import signal
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from tracehaul.runtime import clock

LOG_TAIL_BYTES = 8192
OPERATOR_KEY = "operator.key"
FAULT_EXIT = 3
"""Exit code of a node whose last line of output says in one line why it could not run."""
FENCED_EXIT = 4
"""Exit code of a node that another of its name has replaced: it must not be started again."""


class ClusterFault(Exception):
    """What the operator must know, in one line: shown as it is, without a traceback."""


class ProcessRecord(msgspec.Struct, frozen=True):
    """One process of this cluster."""

    name: str
    pid: int
    start_ticks: int
    """When the kernel started it, in clock ticks since boot: tells it from a later owner of the same pid."""


Phase = Literal["starting", "loading model", "joining", "ready", "stopping"]


class NodeState(msgspec.Struct, frozen=True):
    """How far a node has come, as it says itself."""

    phase: Phase
    address: str = ""
    """``host:port`` of its control plane; empty until it listens."""
    metrics: str = ""
    """``host:port`` where ``/metrics`` answers; empty until it does."""


def start_ticks(pid: int) -> int | None:
    """When ``pid`` was started; None if there is no such process, or only its unreaped remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in parentheses and may itself hold spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def alive(record: ProcessRecord) -> bool:
    """Whether that very process still runs."""
    return start_ticks(record.pid) == record.start_ticks


def stop(records: Sequence[ProcessRecord], *, grace_s: float) -> list[str]:
    """Ends these processes and waits for it: SIGTERM, up to ``grace_s`` for all, then SIGKILL to their groups.

    Returns the names of those that had to be killed. Processes that are gone already are not an error.
    """
    handles: dict[int, ProcessRecord] = {}
    try:
        for record in records:
            try:
                handle = os.pidfd_open(record.pid)
            except ProcessLookupError:
                continue
            handles[handle] = record
            # Compared after opening: from here on the handle cannot come to mean another process.
            if alive(record):
                signal.pidfd_send_signal(handle, signal.SIGTERM)
            else:
                os.close(handle)
                del handles[handle]
        left = _wait_exit(set(handles), grace_s)
        killed = [handles[handle].name for handle in sorted(left)]
        for handle in sorted(left):
            record = handles[handle]
            try:
                # Every node leads a session of its own, so its group is it and its children.
                if os.getpgid(record.pid) == record.pid:
                    os.killpg(record.pid, signal.SIGKILL)
                else:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            except ProcessLookupError:
                continue
        _wait_exit(left, 10.0)
        return killed
    finally:
        for handle in handles:
            os.close(handle)


def _wait_exit(handles: set[int], timeout_s: float) -> set[int]:
    """Those of ``handles`` whose processes still run after ``timeout_s``."""
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    left = set(handles)
    deadline = clock.perf_s() + timeout_s
    while left and (remaining_s := deadline - clock.perf_s()) > 0:
        for handle, _ in poll.poll(remaining_s * 1000):
            poll.unregister(handle)
            left.discard(handle)
    return left


class RunDir:
    """Reads and writes one run directory. Files are replaced whole, so a reader never sees half of one."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.plan_file = self.path / "cluster.json"
        self.host_file = self.path / "host.json"
        """What a supervisor here was ordered to do."""
        self.operator_key = self.path / OPERATOR_KEY
        """A key of this launch's own, for the commands that are run here; where the API asks for keys."""

    def create(self) -> None:
        """Makes the directories.

        Raises:
            ClusterFault: they cannot be made or written.
        """
        try:
            for part in ("processes", "state", "logs"):
                (self.path / part).mkdir(parents=True, exist_ok=True)
            probe = self.path / "probe.tmp"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ClusterFault(
                f"cannot write the run directory {self.path}: {error.strerror}; choose another with --run-dir"
            ) from error

    @contextmanager
    def lock(self) -> Generator[None, None, None]:
        """Held while a cluster is being started; the kernel lets go of it when the holder dies.

        Raises:
            ClusterFault: somebody else holds it.
        """
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ClusterFault(
                    f"another `tracehaul up` is starting a cluster in {self.path}; stop it with: tracehaul down"
                ) from error
            yield
        finally:
            os.close(handle)

    def record(self, name: str, pid: int) -> ProcessRecord:
        """Notes that process ``pid`` belongs to this cluster. A process that has died already is noted as such."""
        record = ProcessRecord(name, pid, start_ticks(pid) or 0)
        self._write(self.path / "processes" / f"{name}.json", msgspec.json.encode(record))
        return record

    def enter(self, name: str) -> None:
        """This process is that node from now on.

        Raises:
            ClusterFault: another one is.
        """
        for record in self.records():
            if record.name == name and record.pid != os.getpid() and alive(record):
                raise ClusterFault(f"{name} runs already, as process {record.pid}")
        self.record(name, os.getpid())

    def records(self) -> list[ProcessRecord]:
        """All noted processes, by name, running or not."""
        found: list[ProcessRecord] = []
        for path in sorted((self.path / "processes").glob("*.json")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=ProcessRecord))
            except (OSError, msgspec.DecodeError) as error:
                raise ClusterFault(f"cannot read {path}: {error}") from error
        return found

    def forget(self, name: str) -> None:
        """Removes what is known of one process; its log stays."""
        (self.path / "processes" / f"{name}.json").unlink(missing_ok=True)
        (self.path / "state" / f"{name}.json").unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes everything but the logs and what traces were answered."""
        for record in (self.path / "processes").glob("*.json"):
            record.unlink(missing_ok=True)
        for state in (self.path / "state").glob("*.json"):
            state.unlink(missing_ok=True)
        self.plan_file.unlink(missing_ok=True)
        self.operator_key.unlink(missing_ok=True)

    def write_state(self, name: str, state: NodeState) -> None:
        """Called by the node ``name`` itself."""
        self._write(self.path / "state" / f"{name}.json", msgspec.json.encode(state))

    def state(self, name: str) -> NodeState:
        """How far that node has come: ``starting`` until it says something else."""
        try:
            return msgspec.json.decode((self.path / "state" / f"{name}.json").read_bytes(), type=NodeState)
        except (OSError, msgspec.DecodeError):
            return NodeState("starting")

    def write_plan(self, data: bytes) -> None:
        """What the nodes read."""
        self._write(self.plan_file, data)

    def write_host(self, data: bytes) -> None:
        """What a supervisor goes on with when it is started anew."""
        self._write(self.host_file, data)

    def log(self, name: str) -> Path:
        """Where that node's output goes."""
        return self.path / "logs" / f"{name}.log"

    def answers(self, name: str) -> Path:
        """Where that router keeps what its traces were answered."""
        return self.path / "answers" / name

    def epochs(self, name: str) -> Path:
        """Where that router keeps the epochs that it knows of."""
        return self.path / "epochs" / name

    def log_tail(self, name: str, lines: int) -> list[str]:
        """The last lines of a node's output."""
        try:
            with self.log(name).open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - LOG_TAIL_BYTES))
                return file.read().decode(errors="replace").splitlines()[-lines:]
        except OSError:
            return []

    def _write(self, path: Path, data: bytes) -> None:
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_bytes(data)
        fresh.replace(path)
