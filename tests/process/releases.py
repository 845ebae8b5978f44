"""A cluster whose nodes are of two releases, and traces on it that are compared with one engine alone."""

import contextlib
import os
import random
import subprocess
import sys
import threading
import time  # noqa: TID251 - waits for other processes
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.common import fake_node
from cluster.launch import free_port
from tracehaul.engine.fake import TrueState
from tracehaul.wire.steps import Sampling

PROGRAM = Path(fake_node.__file__)
VOCABULARY = 256
PLAN_PROGRAM = Path(__file__).with_name("release_plan.py")
STORES, WORKERS, ROUTERS = ("store-0", "store-1"), ("prefill-0", "decode-0", "decode-1"), ("router-0", "router-1")
START_S, END_S = 60.0, 20.0
FIRST_TOKENS, MORE_TOKENS, ANSWER_TOKENS, STEPS = 120, 40, 8, 6
PAUSE_S = 0.05
"""Between two steps of a trace: its tools."""
GREEDY = Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0)


class Mixed:
    """Two routers, two stores, a prefill worker and two decode workers, each of the release that it was started as."""

    def __init__(self, folder: Path, old: Path, transport: str) -> None:
        """``old``: the tree of a release, which writes the plan."""
        self._runs = [folder / router for router in ROUTERS]
        ports = [free_port() for _ in ROUTERS]
        places = [f"{run}:{port}" for run, port in zip(self._runs, ports, strict=True)]
        self._run(old, str(PLAN_PROGRAM), transport, *places).wait(START_S)
        urls = {router: f"http://127.0.0.1:{port}" for router, port in zip(ROUTERS, ports, strict=True)}
        self.http = {name: httpx.Client(base_url=url, timeout=30.0, trust_env=False) for name, url in urls.items()}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def _run(self, tree: Path, *words: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(tree), "FAKE_VOCABULARY": str(VOCABULARY)}
        with (self._runs[0].parent / "output").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-P", *words], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def start(self, tree: Path, *names: str, ready: bool = True) -> None:
        """Those nodes, as the release in ``tree``; one that runs is stopped first. Returns when all nodes serve, unless
        that is not asked for."""
        before = {name: process for name in names if (process := self._processes.get(name)) is not None}
        lives = next((lives for router in ROUTERS if (lives := self._lives(router))), {})
        for process in before.values():
            process.terminate()
        for name, process in before.items():
            assert process.wait(END_S) == 0, name
        for name in names:
            run = self._runs[ROUTERS.index(name) if name in ROUTERS else 0]
            words = [str(PROGRAM), "node", name, "--config", str(run / "cluster.json")]
            self._processes[name] = self._run(tree, *words)
        if ready:
            self._wait({name: lives[name] for name in names if name in lives})

    @property
    def routers(self) -> list[str]:
        """Those that run."""
        return [name for name in ROUTERS if name in self._processes]

    def _wait(self, before: dict[str, int]) -> None:
        """Until each router has all others on its list, in other lives than these."""
        others = self._processes.keys() - set(ROUTERS)
        end_s = time.monotonic() + START_S
        for router in self.routers:
            while True:
                lives = self._lives(router)
                known = {name for name, life in lives.items() if before.get(name) != life}
                if known == others:
                    break
                assert time.monotonic() < end_s, f"{router} knows {known}"
                codes = {
                    name: code for name, process in self._processes.items() if (code := process.poll()) is not None
                }
                assert not codes, codes
                time.sleep(0.05)

    def _lives(self, router: str) -> dict[str, int]:
        """Of those that serve, as that router says; none while it does not answer."""
        try:
            told = self.http[router].get("/cluster").json()
        except httpx.TransportError:
            return {}
        return {node["info"]["node"]: node["info"]["generation"] for node in told if node["health"] == "ready"}

    def end(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Trace:
    """One, each of whose prompts is the last one, its answer and a little more."""

    def __init__(self, cluster: Mixed, name: str, routers: Sequence[str]) -> None:
        self._clients = [cluster.http[router] for router in routers]
        self._name = name
        self._random = random.Random(name)
        self._truth = TrueState(VOCABULARY)
        self._tokens = FIRST_TOKENS
        self.steps, self.pulled = 0, 0

    def step(self, decode: str = "") -> None:
        """On that decode worker, if it is named.

        Raises:
            AssertionError: it fails, or its tokens are not those of one engine.
        """
        new = [self._random.randrange(VOCABULARY) for _ in range(self._tokens)]
        self._tokens = MORE_TOKENS
        self._truth.extend(new)
        answer = self._ask(self._truth.tokens, decode)
        assert answer.status_code == 200, f"{self._name}: {answer.status_code} {answer.text}"
        told: dict[str, Any] = answer.json()
        tokens = told["choices"][0]["token_ids"]
        assert tokens == self._truth.generate(GREEDY), f"{self._name}, step {self.steps}"
        self._truth.extend(tokens)
        self.steps += 1
        self.pulled += told["usage"]["tracehaul"]["pulled_tokens"]

    def _ask(self, prompt: list[int], decode: str) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        body |= {"return_token_ids": True, "ignore_eos": True}
        headers = {"X-Trace-Id": self._name} | ({"X-Decode-Worker": decode} if decode else {})
        end_s = time.monotonic() + START_S
        while True:
            client = self._clients[0]
            try:
                return client.post("/v1/completions", json=body, headers=headers)
            except httpx.TransportError:  # as of a router that is started anew: there is another one
                assert time.monotonic() < end_s
                self._clients.append(self._clients.pop(0))
                time.sleep(0.05)


class Work:
    """What traces have done so far."""

    def __init__(self) -> None:
        self.steps = 0
        self.failed: list[str] = []


@contextlib.contextmanager
def working(cluster: Mixed, count: int) -> Generator[Work, None, None]:
    """So many traces at a time, one after another, for as long as the context is open."""
    work, ending = Work(), threading.Event()

    def run(number: int) -> None:
        at = 0
        while not ending.is_set():
            at += 1
            trace = Trace(
                cluster, f"agent-{number}-{at}", cluster.routers[number % 2 :] + cluster.routers[: number % 2]
            )
            try:
                while trace.steps < STEPS and not ending.is_set():
                    trace.step()
                    work.steps += 1
                    time.sleep(PAUSE_S)
            except (AssertionError, httpx.HTTPError) as error:
                work.failed.append(f"{type(error).__name__} {error}"[:500])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield work
    finally:
        ending.set()
        for thread in threads:
            thread.join()
