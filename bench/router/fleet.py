"""A real router in a process of its own, one fake decode worker in another, and the prompts to ask it with."""

import asyncio
import contextlib
import gzip
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from rich.console import Console

from bench.common.processes import Place, Process
from bench.router.client import Client
from bench.router.worker import Told
from cluster.config import ROUTER, ClusterConfig, NodeCounts
from cluster.launch import free_port, make_plan
from cluster.model import kv_layout
from cluster.plan import save_plan
from cluster.rundir import RunDir
from router.http.config import ApiConfig
from tracehaul.model.text import Text
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import BlockHash, StepId, TraceId
from tracehaul.wire.steps import DecodeStep, Sampling, Tokens

CONTEXT_MAX = 131_072
"""Tokens: 400 kB of the prompts' text fit, 1 MB does not."""
REQUESTS_MAX = 4096
CONNECTIONS = 16
ANSWER_TOKENS = 16
WORD = " people"
"""All that the fake worker says: one token, and nothing else in an answer looks like it."""
READY_S = 60.0
STOP_S = 15.0
CHUNK_TOKENS = 500
"""The prompts are made of pieces of so many."""


Message = dict[str, str]


class Prompts:
    """Text as agents read it: the sources of Python's own library, cut to tokens. ``tokens`` of it are read."""

    def __init__(self, text: Text, tokens: int) -> None:
        ids: list[int] = []
        for path in sorted(Path(os.__file__).parent.glob("*.py")):
            source = path.read_text()
            if source.isascii() and len(ids) < tokens:
                ids += text.encode(source)
        starts = range(0, len(ids) - CHUNK_TOKENS, CHUNK_TOKENS)
        self._pieces = [text.raw(ids[start : start + CHUNK_TOKENS]) for start in starts]
        self._turn = cycle(self._pieces)

    def take(self, tokens: int) -> str:
        """The next text of so many tokens, about; round and round."""
        whole = "".join(next(self._turn) for _ in range(-(-tokens // CHUNK_TOKENS)))
        return whole[: len(whole) * tokens // (-(-tokens // CHUNK_TOKENS) * CHUNK_TOKENS)]

    def characters(self, count: int) -> str:
        """So many characters of it."""
        text = ""
        while len(text) < count:
            text += next(self._turn)
        return text[:count]


class RouterAlone:
    """The running two."""

    def __init__(
        self,
        model: str,
        port: int,
        router: subprocess.Popen[bytes],
        start: Callable[[], subprocess.Popen[bytes]],
        worker: Process,
        root: BlockHash,
    ) -> None:
        """``start``: another router in its place, which may not serve yet when it returns."""
        self.model = model
        self.port = port
        self.worker = worker
        self._start = start
        self._router = router
        self._root = root
        self.worker_address = str(worker.hear())
        self._names = 0

    def name(self) -> str:
        """A fresh one, always of the same length."""
        self._names += 1
        return f"task-{self._names:08d}"

    def opening(self, name: str, text: str) -> list[dict[str, str]]:
        """The messages of a conversation that begins like no other."""
        return [
            {"role": "system", "content": f"You are a careful engineer; this is {name}."},
            {"role": "user", "content": text},
        ]

    def request(
        self,
        messages: Sequence[dict[str, str]],
        answer_tokens: int,
        trace: str | None = None,
        *,
        packed: bool = False,
    ) -> bytes:
        """A streamed chat call, ready to be sent; ``packed`` with gzip."""
        asked = {"model": self.model, "messages": messages, "max_tokens": answer_tokens, "stream": True}
        body = msgspec.json.encode(asked)
        return http("POST", "/v1/chat/completions", gzip.compress(body, 1) if packed else body, trace, packed=packed)

    def client(self, connections: int = 1) -> Client:
        """One that counts the worker's word."""
        return Client(self.port, WORD.encode(), connections)

    def cpu_s(self) -> float:
        """CPU seconds of the router so far, to the nanosecond: of all its threads, none of which ends early."""
        parts = Path(f"/proc/{self._router.pid}/task").glob("*/schedstat")
        return sum(int(part.read_text().split()[0]) for part in parts) / 1e9

    def rss_mb(self) -> float:
        """The router's resident memory in MB."""
        return self._memory_mb("VmRSS")

    def peak_mb(self) -> float:
        """The most that it was, in MB."""
        return self._memory_mb("VmHWM")

    def forget_peak(self) -> None:
        """It counts from now on."""
        Path(f"/proc/{self._router.pid}/clear_refs").write_text("5")

    def _memory_mb(self, kind: str) -> float:
        lines = Path(f"/proc/{self._router.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024 / 1e6

    def kill(self) -> None:
        """SIGKILL; another begins over what it kept."""
        self._router.kill()
        self._router.wait()
        self._router = self._start()

    def pin(self) -> None:
        """The router on one core, everybody else on the others; where there is but one, all on that."""
        cores = sorted(os.sched_getaffinity(0))
        for task in Path(f"/proc/{self._router.pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cores[:1])
        os.sched_setaffinity(0, cores[1:] or cores)
        self.worker.ask(do="pin", cores=cores[1:] or cores)

    def trips(self, prompt_tokens: int, count: int) -> list[float]:
        """Seconds from a step's sending to its first token, without a router: one after the other."""
        return uvloop.run(self._trips(prompt_tokens, count))

    async def _trips(self, prompt_tokens: int, count: int) -> list[float]:
        peers = Peers(TcpNetwork())
        prompt = pack_tokens(range(prompt_tokens))
        trips: list[float] = []
        for number in range(count):
            sampling = Sampling(max_tokens=1)
            step, trace = StepId(f"direct-{number}"), TraceId(f"direct-{number}")
            message = DecodeStep(step, trace, self._root, prompt, b"", "", None, None, sampling, trace)
            began_s = clock.perf_s()
            replies = peers.stream(self.worker_address, message, idle_timeout_s=5.0)
            assert isinstance(await anext(replies), Tokens)
            trips.append(clock.perf_s() - began_s)
            async for _ in replies:
                pass
        await peers.close()
        return trips


def http(method: str, path: str, body: bytes = b"", trace: str | None = None, *, packed: bool = False) -> bytes:
    """A request, ready to be sent."""
    lines = [f"{method} {path} HTTP/1.1", "host: router", f"content-length: {len(body)}"]
    lines += ["content-type: application/json"] if body else []
    lines += [f"x-trace-id: {trace}"] if trace is not None else []
    lines += ["content-encoding: gzip"] if packed else []
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextmanager
def router_alone(
    text: Text, console: Console, module: str = "cluster.cli", **more: Any
) -> Generator[RouterAlone, None, None]:
    """A fresh router and its worker; both end with the context. ``module``: the program that the router is; ``more`` of
    its :class:`ClusterConfig`."""
    more = {"api": ApiConfig(requests_max=REQUESTS_MAX), **more}
    config = ClusterConfig(port=free_port(), nodes=NodeCounts(prefill=0), threads=1, **more)
    token = text.encode(WORD)
    assert len(token) == 1, token
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory(prefix="tracehaul-bench-") as folder, contextlib.ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cores)
        run = RunDir(Path(folder))
        run.create()
        plan = make_plan(config, console)
        save_plan(run, plan)
        command = [sys.executable, "-m", module, "node", ROUTER, "--config", str(run.plan_file)]
        log = stack.enter_context(run.log(ROUTER).open("ab"))

        def start() -> subprocess.Popen[bytes]:
            router = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(_stop, router)
            _wait_ready(run, router)
            return router

        router = start()
        model = plan.pools[0].model
        layout = kv_layout(model, config.dtype)
        root = layout.root()
        told = Told(plan.routers[0], model.name, root.hex(), layout.block_tokens, CONTEXT_MAX, token[0])
        words = msgspec.json.encode(told).decode()
        worker = Process(Place("127.0.0.1"), words, module="bench.router.worker")
        stack.callback(worker.end)
        yield RouterAlone(model.name, config.port, router, start, worker, root)


def _wait_ready(run: RunDir, router: subprocess.Popen[bytes]) -> None:
    began_s = clock.perf_s()
    while run.state(ROUTER).phase != "ready":
        if router.poll() is not None or clock.perf_s() - began_s > READY_S:
            raise RuntimeError("the router does not come up: " + "\n".join(run.log_tail(ROUTER, 12)))
        asyncio.run(asyncio.sleep(0.05))


def _stop(router: subprocess.Popen[bytes]) -> None:
    router.terminate()
    try:
        router.wait(STOP_S)
    except subprocess.TimeoutExpired:
        router.kill()
        router.wait()
