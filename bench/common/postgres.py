"""A PostgreSQL server of one's own, of Debian's package ``postgresql``, as whoever may run it: it refuses root."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import NamedTuple

from cluster.launch import free_port

START_S = 60
STARTS, START_PAUSE_S = 4, 2.0


class Postgres:
    """A cluster of databases in a folder; it does not run before :meth:`start`."""

    def __init__(self, folder: Path, programs: Path, user: str | None) -> None:
        self.port = free_port()
        self._folder = folder
        self._programs = programs
        self._user = user
        self._do("initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "tracehaul", "-N")

    def url(self, database: str) -> str:
        """Of one of them."""
        return f"postgresql://tracehaul@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Returns when it serves. A child of one that was killed may live for a moment, and keeps its memory."""
        options = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off -c shared_buffers=16MB"
        log = str(self._folder / "log")
        words = ("pg_ctl", "-D", str(self._folder / "data"), "-l", log, "-w", "-o", options, "start")
        for _ in range(STARTS - 1):
            with suppress(AssertionError):
                self._do(*words)
                return
            Event().wait(START_PAUSE_S)
        self._do(*words)

    def kill(self) -> None:
        """All of it, as if its machine had lost power, but for the disk."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self, how: str = "immediate") -> None:
        """``how``: as ``pg_ctl`` has it."""
        self._do("pg_ctl", "-D", str(self._folder / "data"), "-m", how, "-w", "stop")

    def create(self, database: str) -> str:
        """A new one; returns its URL."""
        self._do("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tracehaul", database)
        return self.url(database)

    def say(self, words: str, *, writes: bool = False) -> None:
        """To the server itself; ``writes``: also where nobody may."""
        options = "-c default_transaction_read_only=off" if writes else ""
        address = f"host=127.0.0.1 port={self.port} user=tracehaul dbname=postgres options='{options}'"
        self._do("psql", address, "-v", "ON_ERROR_STOP=1", "-c", words)

    def processes(self) -> list[int]:
        """All of its own."""
        main = int((self._folder / "data" / "postmaster.pid").read_text().split()[0])
        children = (Path("/proc") / str(main) / "task" / str(main) / "children").read_text()
        return [main, *map(int, children.split())]

    def _do(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        out = self._folder / "out"  # no pipe: the server would keep it open
        with out.open("w") as file:
            done = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                user=self._user,
                cwd="/",
                timeout=START_S,
            )
        assert done.returncode == 0, out.read_text()


class NoPostgres(Exception):
    """There is none here, or it cannot be run; says why."""


class Found(NamedTuple):
    """Its programs, and who may run them."""

    programs: Path
    user: str | None
    """None: whoever we are."""


def found() -> Found:
    """Raises NoPostgres."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    program = folders[-1] if folders else shutil.which("initdb")
    if program is None:
        raise NoPostgres("PostgreSQL is not installed (Debian: postgresql)")
    if os.geteuid() != 0:
        return Found(Path(program).parent, None)
    try:
        return Found(Path(program).parent, pwd.getpwnam("postgres").pw_name)
    except KeyError:
        raise NoPostgres("PostgreSQL refuses root, and there is no user postgres") from None


@contextmanager
def postgres(by: Found) -> Generator[Postgres, None, None]:
    """One that runs."""
    folder = Path(tempfile.mkdtemp(prefix="tracehaul-pg-", dir="/tmp"))
    try:
        if by.user is not None:
            account = pwd.getpwnam(by.user)
            os.chown(folder, account.pw_uid, account.pw_gid)
        server = Postgres(folder, by.programs, by.user)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
