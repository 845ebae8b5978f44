"""A fleet of stock servers of one engine on this machine, and what can be seen of each from outside."""

import contextlib
import os
import re
import signal
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from rich.console import Console

from bench.common.fleet import Fleet, Step, environment, fleet
from bench.engine.model import hub_folder
from cluster.config import ClusterConfig, NodeCounts, PoolConfig
from cluster.engines import EngineName
from cluster.launch import free_port
from router.dispatch.config import DispatchConfig
from tracehaul.model.source import resolve
from tracehaul.model.text import Text

POOL = "small"
CONTEXT_MAX = 8192
BLOCK_TOKENS = 32
STORE_BYTES = 1 << 30
START_TIMEOUT_S = 600.0
ANSWER_TIMEOUT_S = 10.0
CHECKOUT = Path(__file__).parents[2]


class Engine(NamedTuple):
    """What the benches must know of one engine. Another one is another of these, in :mod:`bench.engines.known`."""

    name: EngineName
    """As ``engine`` in a cluster's file says it."""
    python: Path
    """Its interpreter, of ``scripts/peers``' folder."""
    args: tuple[str, ...]
    """Options of each server, beside those that the worker gives it."""
    environment: Mapping[str, str]
    store_metric: str
    """A counter on its server's page: tokens of prompts that it had from the store. Empty: its answers say it."""


class Server(NamedTuple):
    """One worker's stock server."""

    node: str
    pid: int
    url: str

    def metric(self, name: str) -> float:
        """The sum of its samples of that name, whatever their labels."""
        page = httpx.get(f"{self.url}/metrics", timeout=ANSWER_TIMEOUT_S, trust_env=False).text
        pattern = re.compile(rf"^{re.escape(name)}(?:\{{[^\n]*\}})? (\S+)$", re.MULTILINE)
        return sum(float(value) for value in pattern.findall(page))


class Stock:
    """A running fleet of them."""

    def __init__(self, running: Fleet, engine: Engine) -> None:
        self.running = running
        self.engine = engine
        self.pool = POOL

    def server(self, node: str) -> Server:
        """The server that this worker has started."""
        keeper = next(pid for pid in _children(self.running.pids()[node]) if b"server_keeper" in _command(pid))
        (pid,) = _children(keeper)
        words = _command(pid).split(b"\0")
        return Server(node, pid, f"http://127.0.0.1:{int(words[words.index(b'--port') + 1])}")

    def kill(self, node: str) -> None:
        """As the kernel does when memory is short: the server alone, at once."""
        os.kill(self.server(node).pid, signal.SIGKILL)

    def handed_off(self, node: str) -> float:
        """Steps of this decode worker whose prompt a prefill worker was to compute."""
        return self.running.metric(node, "tracehaul_adapter_handed_off_steps_total")

    def computed(self, node: str) -> float:
        """Tokens of prompts that this prefill worker was asked to compute."""
        return self.running.metric(node, "tracehaul_adapter_prompt_tokens_total")

    def step(self, node: str, trace: str, prompt: list[int], outputs: int, **body: Any) -> tuple[Step, int]:
        """A greedy step on that worker, and how many tokens of its prompt its server had from the store."""
        server, metric = self.server(node), self.engine.store_metric
        before = server.metric(metric) if metric else 0
        step = self.running.step(trace, prompt, outputs, node, ignore_eos=True, **body)
        return step, int(server.metric(metric) - before) if metric else step.moved["pulled_tokens"]


@contextlib.contextmanager
def stock_fleet(engine: Engine, prefill: int, decode: int, console: Console) -> Generator[Stock]:
    """So many workers with a server each, one store node, one router, which hands every long prompt to a prefill
    worker, if there is one, whatever that costs."""
    pool = PoolConfig(
        model=str(hub_folder()),
        engine=engine.name,
        engine_python=str(engine.python),
        engine_args=engine.args,
        prefill=prefill,
        decode=decode,
    )
    config = ClusterConfig(
        port=free_port(),
        nodes=NodeCounts(store=1),
        pools={POOL: pool},
        store_bytes=STORE_BYTES,
        start_timeout_s=START_TIMEOUT_S,
        dispatch=DispatchConfig(policy="sticky"),
    )
    with environment({"PYTHONPATH": str(CHECKOUT), **engine.environment}), fleet(config, console) as running:
        yield Stock(running, engine)


def prompts(count: int, tokens: int) -> list[list[int]]:
    """Different ones, of sense: pages of this project. A model is surer of what follows there than of what follows
    random tokens, so two ways to compute the same differ less often.

    Raises:
        ValueError: there are not so many pages.
    """
    text = Text.load(resolve(str(hub_folder())))
    pages = "\n\n".join(page.read_text() for page in sorted((CHECKOUT / "docs").glob("*.md")))
    words = text.encode(pages)
    made: list[list[int]] = []
    for number in range(count):
        begin = text.encode(f"Part {number} of the pages:\n")
        at = number * tokens
        if at + tokens > len(words):
            raise ValueError(f"the pages have {len(words)} tokens: not enough for {count} prompts of {tokens}")
        made.append([*begin, *words[at : at + tokens - len(begin)]])
    return made


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
