"""A cluster of real processes to measure, and a client that times it."""

import os
import signal
import tempfile
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import httpx
import msgspec
from rich.console import Console

from cluster.config import ClusterConfig, base_url
from cluster.hosts.asks import supervisor_pid
from cluster.hosts.supervise import NAME as SUPERVISOR
from cluster.launch import down, restart, up
from cluster.rundir import RunDir
from tracehaul.runtime import clock

STEP_TIMEOUT_S = 300.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Step(msgspec.Struct, frozen=True):
    """What a client saw of one step."""

    ttft_s: float
    total_s: float
    tokens: list[int]
    usage: dict[str, Any]
    finish_reason: str | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that nobody computed again."""
        return self.usage["prompt_tokens_details"]["cached_tokens"]

    @property
    def moved(self) -> dict[str, Any]:
        """The cluster's own account of where the context came from."""
        return self.usage["tracehaul"]


class Fleet:
    """A running cluster."""

    def __init__(self, config: ClusterConfig, run: RunDir, model: str, console: Console) -> None:
        self.run = run
        self.model = model
        self._console = console
        self.url = base_url(config)
        self._http = httpx.Client(base_url=self.url, timeout=STEP_TIMEOUT_S, trust_env=False)

    def chunks(
        self,
        trace: str,
        prompt: list[int],
        max_tokens: int,
        decode: str | None = None,
        parent: str | None = None,
        **body: Any,
    ) -> Generator[dict[str, Any], None, None]:
        """The stream of one step of ``trace``, chunk by chunk; on decode worker ``decode`` if it is named. ``parent``:
        the trace that it was forked from.

        Raises:
            RuntimeError: the cluster answered with an error.
        """
        headers = {"X-Trace-Id": trace} | ({"X-Decode-Worker": decode} if decode else {})
        headers |= {"X-Parent-Trace-Id": parent} if parent else {}
        request: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **body,
        }
        with self._http.stream("POST", "/v1/completions", json=request, headers=headers) as response:
            if not response.is_success:
                raise RuntimeError(f"{response.status_code}: {response.read().decode(errors='replace')}")
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = msgspec.json.decode(line[6:])
                if "error" in chunk:
                    raise RuntimeError(str(chunk["error"]))
                yield chunk

    def step(
        self,
        trace: str,
        prompt: list[int],
        max_tokens: int,
        decode: str | None = None,
        parent: str | None = None,
        **body: Any,
    ) -> Step:
        """One step, timed; arguments and errors are those of :meth:`chunks`."""
        started_s = clock.perf_s()
        first_s = 0.0
        tokens: list[int] = []
        usage: dict[str, Any] = {}
        reason: str | None = None
        for chunk in self.chunks(trace, prompt, max_tokens, decode, parent, **body):
            for choice in chunk["choices"]:
                if choice.get("token_ids") and not tokens:
                    first_s = clock.perf_s() - started_s
                tokens += choice.get("token_ids") or []
                reason = choice.get("finish_reason") or reason
            usage = chunk.get("usage") or usage
        return Step(first_s, clock.perf_s() - started_s, tokens, usage, reason)

    def post(self, path: str, body: dict[str, Any]) -> None:
        """Ask the router for something that is not a step.

        Raises:
            RuntimeError: it answered with an error.
        """
        response = self._http.post(path, json=body)
        if not response.is_success:
            raise RuntimeError(f"{response.status_code}: {response.text}")

    def metrics(self) -> str:
        """The router's metrics page."""
        return self._http.get("/metrics").text

    def metric(self, node: str, name: str) -> float:
        """One sample of a node's own metrics page, by its full name with labels; 0 if there is none."""
        page = self._http.get(f"http://{self.run.state(node).metrics}/metrics").text
        return next((float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(f"{name} ")), 0.0)

    def nodes(self) -> list[dict[str, Any]]:
        """Its members, as the router sees them."""
        return self._http.get("/cluster").json()

    def restart(self, names: Iterable[str]) -> None:
        """Stop these nodes, start them anew, and wait until they serve again."""
        restart(self.run, list(names), self._console)

    def pids(self) -> dict[str, int]:
        """Every process of the cluster by node name."""
        return {record.name: record.pid for record in self.run.records()}

    def cpu_s(self) -> float:
        """Processor time that all its processes have used, in seconds."""
        return sum(_cpu_s(pid) for pid in self._processes().values())

    def rss_mib(self) -> dict[str, float]:
        """Resident memory by node; an arena that two processes map counts in both."""
        return {name: _rss_mib(pid) for name, pid in self._processes().items()}

    def _processes(self) -> dict[str, int]:
        """The nodes' and their supervisor's."""
        pid = supervisor_pid(self.run)
        return self.pids() | ({} if pid is None else {SUPERVISOR: pid})

    def close(self) -> None:
        """Forget the connection; the cluster runs on."""
        self._http.close()


@contextmanager
def fleet(config: ClusterConfig, console: Console) -> Generator[Fleet, None, None]:
    """Starts a cluster in a temporary run directory; stops it at the end, also where that is a SIGTERM. A node that is
    killed stays dead."""
    config = msgspec.structs.replace(config, restart="never")
    with tempfile.TemporaryDirectory(prefix="tracehaul-bench-") as folder:
        run = RunDir(Path(folder))
        model = up(config, run, console)[0]
        end_on_sigterm()  # after it: launching handles signals itself, and puts back the default
        try:
            running = Fleet(config, run, model, console)
            yield running
            running.close()
        finally:
            down(run)


@contextmanager
def environment(said: Mapping[str, str]) -> Generator[None, None, None]:
    """Variables of all that is started meanwhile."""
    before = {name: os.environ.get(name) for name in said}
    os.environ.update(said)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def end_on_sigterm() -> None:
    """A SIGTERM ends this process as its end would: what was started is stopped."""
    signal.signal(signal.SIGTERM, _leave)


def _leave(signum: int, _: FrameType | None) -> NoReturn:
    signal.signal(signum, signal.SIG_IGN)  # told once more, it would leave the cluster half stopped
    raise SystemExit(128 + signum)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def _rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
