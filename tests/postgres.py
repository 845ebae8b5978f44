"""A PostgreSQL server of one's own, of Debian's package ``postgresql``, as whoever may run it: it refuses root."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.launch import free_port

START_S = 60


class Postgres:
    """A cluster of databases in a folder; it does not run before :meth:`start`."""

    def __init__(self, folder: Path, programs: Path, user: str | None) -> None:
        self.port = free_port()
        self._folder = folder
        self._programs = programs
        self._user = user
        self._do("initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "tracehaul", "-N")

    def url(self, database: str) -> str:
        return f"postgresql://tracehaul@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        options = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off -c shared_buffers=16MB"
        log = str(self._folder / "log")
        self._do("pg_ctl", "-D", str(self._folder / "data"), "-l", log, "-w", "-o", options, "start")

    def stop(self, how: str = "immediate") -> None:
        self._do("pg_ctl", "-D", str(self._folder / "data"), "-m", how, "-w", "stop")

    def create(self, database: str) -> str:
        """A new one; returns its URL."""
        self._do("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "tracehaul", database)
        return self.url(database)

    def _do(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        out = self._folder / "out"  # no pipe: the server would keep it open
        with out.open("w") as file:
            done = subprocess.run(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, user=self._user, cwd="/", timeout=START_S
            )
        assert done.returncode == 0, out.read_text()


@contextmanager
def postgres() -> Generator[Postgres, None, None]:
    """One that runs; skips aloud where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    program = found[-1] if found else shutil.which("initdb")
    if program is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    user = None
    folder = Path(tempfile.mkdtemp(prefix="tracehaul-pg-", dir="/tmp"))
    if os.geteuid() == 0:
        try:
            account = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL refuses root, and there is no user postgres")
        os.chown(folder, account.pw_uid, account.pw_gid)
        user = "postgres"
    try:
        server = Postgres(folder, Path(program).parent, user)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
