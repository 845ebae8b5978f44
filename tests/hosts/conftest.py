"""Hosts to run fleets on, and what drives them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.hosts.rig import Rig, rig, why_not
from tests.process.conftest import alone  # noqa: F401 - a fixture

MODEL = "smollm2-135m-instruct"
PORT = 8130
ROOT = Path(__file__).parents[2]
COMMAND_S = 300.0


class Operator:
    """Somebody with a file of hosts, at a place from which ssh reaches them."""

    def __init__(self, made: Rig, folder: Path) -> None:
        self.rig = made
        self.file = folder / "cluster.toml"
        self._environment = {**os.environ, "TRACEHAUL_SSH": made.ssh, "PYTHONPATH": str(ROOT)}

    def write(self, text: str) -> None:
        """The file's content; the CA is kept beside it where it does not say."""
        if "[security]" not in text:
            authority = self.file.with_name("authority")
            text = text.replace("[[hosts]]", f'[security]\nauthority = "{authority}"\n[[hosts]]', 1)
        self.file.write_text(text)

    def ask(self, command: str, *words: str, code: int = 0, timeout_s: float = COMMAND_S) -> str:
        """``tracehaul COMMAND``; what it prints. It must end with that exit code."""
        line = [sys.executable, "-m", "cluster.cli", command, *words]
        if command != "bundle":
            line += ["--config", str(self.file)]
        done = subprocess.run(
            line, env=self._environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == code, f"{' '.join(line[2:])}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout if done.returncode == 0 else done.stdout + done.stderr

    def nodes(self) -> dict[str, dict[str, Any]]:
        """What the hosts that answer say of their nodes."""
        line = [sys.executable, "-m", "cluster.cli", "status", "--json", "--config", str(self.file)]
        done = subprocess.run(line, env=self._environment, cwd=ROOT, capture_output=True, text=True, check=False)
        told = json.loads(done.stdout)
        return {node["name"]: node for report in told["hosts"].values() for node in report["nodes"]}

    def url(self, host: str) -> str:
        """Of a router's API."""
        return f"http://{self.rig.hosts[host].address}:{PORT}"

    def post(
        self, host: str, path: str, body: dict[str, Any], trace: str = "", timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """One request, from the operator's place."""
        words = ["curl", "-sS", "-m", str(timeout_s), self.url(host) + path, "-H", "content-type: application/json"]
        words += ["-H", f"X-Trace-Id: {trace}"] if trace else []
        done = subprocess.run(
            self.rig.at_control(*words, "-d", "@-"), input=json.dumps(body), capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    def get(self, host: str, path: str) -> Any:
        """A page of a router's, from the operator's place; None if nobody answers."""
        words = ["curl", "-sS", "-m", "10", self.url(host) + path]
        done = subprocess.run(self.rig.at_control(*words), capture_output=True, text=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def step(self, host: str, trace: str, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """One step of a trace at the router of that host."""
        body = {"model": MODEL, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0}
        return self.post(host, "/v1/completions", {**body, "return_token_ids": True, "ignore_eos": True}, trace)

    @contextlib.contextmanager
    def agents(self, count: int, *hosts: str) -> Generator[dict[str, Any], None, None]:
        """So many agents at work while the context is open; filled with what they saw when it closes."""
        program = Path(__file__).with_name("agents.py")
        urls = [self.url(host) for host in hosts]
        work = subprocess.Popen(
            self.rig.at_control(sys.executable, str(program), str(count), MODEL, *urls),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        told: dict[str, Any] = {}
        try:
            yield told
        finally:
            out, _ = work.communicate(timeout=120)
            told.update(json.loads(out))


@pytest.fixture(scope="session")
def hosts_rig(tmp_path_factory: pytest.TempPathFactory) -> Generator[Rig, None, None]:
    """Three hosts, ``a``, ``b`` and ``c``."""
    if (why := why_not()) is not None:
        pytest.skip(why)
    with rig(tmp_path_factory.mktemp("rig"), ["a", "b", "c"]) as made:
        yield made


@pytest.fixture(scope="module")
def operator(hosts_rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> Generator[Operator, None, None]:
    """With an empty file; what it has started is stopped in the end."""
    made = Operator(hosts_rig, tmp_path_factory.mktemp("operator"))
    yield made
    for host in hosts_rig.hosts.values():
        host.mend()
    if made.file.exists():
        made.ask("stop")
    for host in hosts_rig.hosts.values():  # the next module's are as new
        host.kill()
        shutil.rmtree(host.root)
        host.start()
    hosts_rig.wait()
