"""A cluster's run directory: what runs, how far each node has come, and where the logs are.

Layout: ``cluster.json`` (the plan that every node reads), ``processes/NAME.json`` (who to stop), ``state/NAME.json``
(written by the node itself), ``logs/NAME.log``, ``operator.key`` (an API key for the commands that are run here).

It is a cache of what can be seen elsewhere: who runs, in the process table; who serves, at the router. Nobody needs it
in order to serve, and what of it cannot be read hides nothing else.
"""

import fcntl
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec

from cluster.processes import ProcessRecord, alive, nodes_running, record_of
from tracehaul.runtime.durable import write_whole
from tracehaul.runtime.log import Log

log = Log(__name__)

LOG_TAIL_BYTES = 8192
PROBE_BYTES = 1 << 16
"""So much room, in each folder, is enough to start a node."""
OPERATOR_KEY = "operator.key"
FAULT_EXIT = 3
"""Exit code of a node whose last line of output says in one line why it could not run."""
FENCED_EXIT = 4
"""Exit code of a node that another of its name has replaced: it must not be started again."""


class ClusterFault(Exception):
    """What the operator must know, in one line: shown as it is, without a traceback."""


class CannotWrite(ClusterFault):
    """The run directory takes nothing: it is full, read-only, gone, or somebody else's."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"cannot write the run directory {path} ({error.strerror or error}): make room there, or choose another "
            "with --run-dir"
        )


Phase = Literal["starting", "loading model", "joining", "ready", "stopping"]


class NodeState(msgspec.Struct, frozen=True):
    """How far a node has come, as it says itself."""

    phase: Phase
    address: str = ""
    """``host:port`` of its control plane; empty until it listens."""
    metrics: str = ""
    """``host:port`` where ``/metrics`` answers; empty until it does."""
    certificates: str = ""
    """The mark of those that it uses (:func:`tracehaul.runtime.credentials.mark_of`); empty: none."""


class RunDir:
    """Reads and writes one run directory. Files are replaced whole, so a reader never sees half of one.

    What writes raises :class:`CannotWrite`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.plan_file = self.path / "cluster.json"
        self.host_file = self.path / "host.json"
        """What a supervisor here was ordered to do."""
        self.operator_key = self.path / OPERATOR_KEY
        """A key of this launch's own, for the commands that are run here; where the API asks for keys."""
        self._processes = self.path / "processes"
        self._states = self.path / "state"
        self._logs = self.path / "logs"

    def create(self) -> None:
        """Makes the directories, and makes sure that there is room in them."""
        name = f"probe.{threading.get_native_id()}.tmp"  # others may do the same now
        probe = self.path / name
        try:
            for folder in (self._processes, self._states, self._logs):
                probe = folder / name
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(probe, bytes(PROBE_BYTES))
                probe.unlink()
        except OSError as error:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
            raise CannotWrite(self.path, error) from error

    def is_writable(self) -> bool:
        """Whether what a node says of itself can be kept now."""
        try:
            self.create()
        except CannotWrite:
            return False
        return True

    @contextmanager
    def lock(self) -> Generator[None, None, None]:
        """Held while a cluster is being started; the kernel lets go of it when the holder dies.

        Raises:
            ClusterFault: somebody else holds it.
        """
        try:
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CannotWrite(self.path, error) from error
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

    # --- who runs -----------------------------------------------------------------------------------------

    def record(self, name: str, pid: int) -> ProcessRecord:
        """Notes that process ``pid`` belongs to this cluster."""
        record = record_of(name, pid)
        self.note(record)
        return record

    def note(self, record: ProcessRecord) -> None:
        """Notes that process."""
        self._write(self._processes / f"{record.name}.json", msgspec.json.encode(record))

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
        """The cluster's processes by name: those that are noted, running or not, and nodes that run without a note."""
        records = {record.name: record for record in self._noted()[0]}
        for running in nodes_running(self.plan_file):
            noted = records.get(running.name)
            if noted is None or not alive(noted):
                records[running.name] = running
        return [records[name] for name in sorted(records)]

    def torn(self) -> list[str]:
        """A line for each note of a process that cannot be read: which, and why. A node of that name that runs is among
        :meth:`records` all the same."""
        return self._noted()[1]

    def _noted(self) -> tuple[list[ProcessRecord], list[str]]:
        found: list[ProcessRecord] = []
        torn: list[str] = []
        try:
            paths = sorted(path for path in self._processes.iterdir() if path.suffix == ".json")
        except FileNotFoundError:
            return [], []
        except OSError as error:
            return [], [f"cannot read {self._processes}: {error.strerror}"]
        for path in paths:
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=ProcessRecord))
            except FileNotFoundError:  # forgotten just now
                continue
            except (OSError, msgspec.DecodeError) as error:
                torn.append(f"cannot read {path}: {error}")
        return found, torn

    def forget(self, name: str) -> None:
        """Removes what is known of one process, as far as that can be; its log stays."""
        for folder in (self._processes, self._states):
            with suppress(OSError):
                (folder / f"{name}.json").unlink(missing_ok=True)

    def clear(self) -> list[str]:
        """Removes everything but logs, files, batches and what traces were answered. A line for each file that
        stays, and why."""
        left: list[str] = []
        paths = [self.plan_file, self.host_file, self.operator_key]
        for folder in (self._processes, self._states):
            with suppress(OSError):
                paths += [path for path in folder.iterdir() if path.suffix in (".json", ".tmp")]
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                left.append(f"cannot remove {path}: {error.strerror}")
        return left

    # --- how far they are ---------------------------------------------------------------------------------

    def write_state(self, name: str, state: NodeState) -> None:
        """Called by the node ``name`` itself."""
        self._write(self._states / f"{name}.json", msgspec.json.encode(state), durable=False)

    def state(self, name: str) -> NodeState:
        """How far that node has come: ``starting`` until it says something else. A hint: the node may have been unable
        to say it."""
        try:
            return msgspec.json.decode((self._states / f"{name}.json").read_bytes(), type=NodeState)
        except (OSError, msgspec.DecodeError):
            return NodeState("starting")

    # --- the plan, the key, logs --------------------------------------------------------------------------

    def write_plan(self, data: bytes) -> None:
        """What the nodes read."""
        self._write(self.plan_file, data)

    def write_operator_key(self, data: bytes) -> None:
        """For whoever may read the run directory as we do."""
        self._write(self.operator_key, data, private=True)

    def write_host(self, data: bytes) -> None:
        """What a supervisor goes on with when it is started anew."""
        self._write(self.host_file, data)

    def log(self, name: str) -> Path:
        """Where that node's output goes."""
        return self._logs / f"{name}.log"

    def answers(self, name: str) -> Path:
        """Where that router keeps what its traces were answered."""
        return self.path / "answers" / name

    def database(self, name: str) -> Path:
        """SQLite's file with what outlives that router."""
        return self.path / "records" / f"{name}.sqlite"

    def jobs(self, name: str) -> Path:
        """Where that router keeps what clients upload, and batches."""
        return self.path / "jobs" / name

    @property
    def webhooks(self) -> Path:
        """Where the secrets are that receivers of events know us by."""
        return self.path / "webhooks"

    def decisions(self) -> Path:
        """Where the router writes down what it decides."""
        return self._logs / "decisions.jsonl"

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

    def _write(self, path: Path, data: bytes, *, private: bool = False, durable: bool = True) -> None:
        try:
            write_whole(path, data, private=private, durable=durable)
        except OSError as error:
            raise CannotWrite(self.path, error) from error


class NotesStats(msgspec.Struct):
    """Counts of a node's life."""

    unwritten: int = 0
    """Notes that the run directory did not take."""


class Notes:
    """What one node writes of itself into the run directory: never needed, so what cannot be written is counted."""

    def __init__(self, run: RunDir, name: str) -> None:
        self.stats = NotesStats()
        self._run = run
        self._name = name
        self._refused = False

    def enter(self) -> None:
        """See :meth:`RunDir.enter`.

        Raises:
            ClusterFault: another process is that node.
        """
        with self._best_effort():
            self._run.enter(self._name)

    def tell(self, state: NodeState) -> None:
        """How far this node is."""
        with self._best_effort():
            self._run.write_state(self._name, state)

    @contextmanager
    def _best_effort(self) -> Generator[None]:
        try:
            yield
        except CannotWrite as fault:
            self.stats.unwritten += 1
            if not self._refused:
                log.warning("not noted: the run directory cannot be written; this node serves all the same", why=fault)
            self._refused = True
        else:
            self._refused = False
