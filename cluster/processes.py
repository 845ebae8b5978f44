"""Processes of a cluster on this machine: who is meant by a note, whether it lives, and how it is ended.

A process is named by its pid, its start time *and* the boot that it was started in, so that a pid that the kernel has
given to somebody else is never signalled.
"""

import os
import select
import signal
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import msgspec

from tracehaul.runtime import clock

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_MODULE = b"cluster.cli"
_COMMAND = b"tracehaul"
_SUPERVISOR = b"cluster.hosts.supervise"
_SUPERVISE = (b"supervise", b"slurm-step")
_RUN_DIR = b"--run-dir"


class ProcessRecord(msgspec.Struct, frozen=True):
    """One process of this cluster."""

    name: str
    pid: int
    start_ticks: int
    """When the kernel started it, in clock ticks since boot: tells it from a later owner of the same pid."""
    boot: str = ""
    """Which boot; empty: it was not noted."""


def record_of(name: str, pid: int) -> ProcessRecord:
    """Of a process that is there now; one that has died already is noted as such."""
    return ProcessRecord(name, pid, start_ticks(pid) or 0, boot_id())


def boot_id() -> str:
    """What the kernel calls the time since it was started; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def start_ticks(pid: int) -> int | None:
    """When ``pid`` was started; None if there is no such process, or only its unreaped remains."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def alive(record: ProcessRecord) -> bool:
    """Whether that very process still runs."""
    if record.boot and record.boot != boot_id():
        return False
    return start_ticks(record.pid) == record.start_ticks


def frozen(record: ProcessRecord) -> bool:
    """Whether that process, which lives, is stopped by a signal or a debugger."""
    fields = _stat(record.pid)
    return fields is not None and fields[0] in ("T", "t")


def age_s(record: ProcessRecord) -> float:
    """How long ago that process was started."""
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    return max(0.0, up_s - record.start_ticks / _TICKS_PER_S)


def _stat(pid: int) -> list[str] | None:
    """The fields of ``/proc/PID/stat`` from the third on, the state; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the program's name in parentheses and may itself hold spaces and parentheses.
    return stat.rpartition(")")[2].split()


def nodes_running(plan_file: Path) -> list[ProcessRecord]:
    """This machine's processes that are nodes of that plan, as their command lines say: known without any note.

    Where two say the same, as for a moment when one forks, the older one is it.
    """
    found: dict[str, ProcessRecord] = {}
    plan = os.path.realpath(plan_file)
    for pid, name, config in _node_commands():
        if os.path.realpath(config) == plan:
            record = record_of(name, pid)
            if alive(record) and (name not in found or record.start_ticks < found[name].start_ticks):
                found[name] = record
    return [found[name] for name in sorted(found)]


def _node_commands() -> Iterator[tuple[int, str, Path]]:
    """Pid, node and plan of every ``tracehaul node NAME --config PLAN`` here."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            words = Path(entry.path, "cmdline").read_bytes().split(b"\0")
            if b"node" not in words or b"--config" not in words or not os.path.basename(words[0]).startswith(b"python"):
                continue  # who only wraps the command, such as sudo, is not it
            at, said = words.index(b"node"), words.index(b"--config")
            if words[at - 1] == _MODULE or os.path.basename(words[at - 1]) == _COMMAND:
                folder = os.readlink(f"{entry.path}/cwd")
                yield int(entry.name), os.fsdecode(words[at + 1]), Path(folder, os.fsdecode(words[said + 1]))
        except (OSError, IndexError):  # it has ended, or is somebody else's
            continue


def supervisors_running(folder: Path, users: Collection[int]) -> list[ProcessRecord]:
    """This machine's processes that supervise that run directory and are these users', as their command lines say; the
    oldest first: while one forks, two say the same."""
    found: list[ProcessRecord] = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and supervises(record := record_of("supervisor", int(entry.name)), folder, users):
            found.append(record)
    return sorted(found, key=lambda record: record.start_ticks)


def supervises(record: ProcessRecord, folder: Path, users: Collection[int]) -> bool:
    """Whether that very process supervises that run directory, as its command line says, and is one of these users'."""
    process = Path(f"/proc/{record.pid}")
    try:
        said = supervised_folder((process / "cmdline").read_bytes().split(b"\0"))
        if said is None:
            return False
        where = Path(os.fsdecode(said))
        if not where.is_absolute():
            where = Path(os.readlink(process / "cwd"), where)
        status = {
            name: values.split()
            for line in (process / "status").read_text().splitlines()
            for name, _, values in [line.partition(":")]
        }
    except OSError:  # it has ended, or is somebody else's
        return False
    ours = int(status["Uid"][1]) in users and len(status.get("NSpid", "1")) == 1  # no container's
    return ours and os.path.realpath(where) == os.path.realpath(folder) and alive(record)


def supervised_folder(words: Sequence[bytes]) -> bytes | None:
    """The run directory of the supervisor that this is the command line of; None: of none."""
    if not os.path.basename(words[0]).startswith(b"python"):
        return None  # who only wraps the command, such as sudo, is not it
    for at, (word, *said) in enumerate(zip(words, words[1:], words[2:], strict=False), start=1):
        if word == b"-m" and said[0] == _SUPERVISOR:
            return said[1]
        if (word == _MODULE or os.path.basename(word) == _COMMAND) and said[0] == b"host" and said[1] in _SUPERVISE:
            options = list(words[at + 2 :])
            if _RUN_DIR in options[:-1]:
                return options[options.index(_RUN_DIR) + 1]
            whole = _RUN_DIR + b"="
            return next((option.removeprefix(whole) for option in options if option.startswith(whole)), b".run")
    return None


def kill(record: ProcessRecord) -> None:
    """Sends SIGKILL to that very process, if it still runs.

    Raises:
        PermissionError: it is somebody else's.
    """
    try:
        handle = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    try:
        if alive(record):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


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
