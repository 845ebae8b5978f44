"""What a server must not do: use another tenant's context, or go on for a client that has left."""

from contextlib import closing

import httpx

from bench.common.report import Result
from bench.engines.stock import ANSWER_TIMEOUT_S, BLOCK_TOKENS, Stock, prompts
from cluster.engines import dialect_of
from tracehaul.runtime import clock

TOKENS = 1024
OUTPUTS = 4096
LEAVES_AFTER = 8
"""Tokens."""
WAIT_S = 10.0


def apart(stock: Stock) -> list[Result]:
    """Tokens that a prompt's own tenant and another had cached, each from the store of the other server; and the time
    from a client's leaving until the server runs nothing."""
    name = f"engines.{stock.engine.name}"
    here, there = (f"decode-{stock.pool}-{number}" for number in (0, 1))
    (prompt,) = prompts(1, TOKENS)
    before = _stored(stock)
    stock.step(here, "own-first", prompt, 2, cache_salt="one")
    until_s = clock.perf_s() + WAIT_S
    while _stored(stock) < before + len(prompt) // BLOCK_TOKENS and clock.perf_s() < until_s:
        pass  # a server writes when it has answered
    own, _ = stock.step(there, "own", prompt, 2, cache_salt="one")
    other, _ = stock.step(there, "other", prompt, 2, cache_salt="two")
    return [
        Result(f"{name}.salt.own", own.cached_tokens / len(prompt), "of tokens"),
        Result(f"{name}.salt.other", other.cached_tokens, "tokens"),
        Result(f"{name}.left", _left_s(stock, here, prompt), "s"),
    ]


def _stored(stock: Stock) -> int:
    """Blocks in the stores."""
    return sum(node["load"].get("blocks", 0) for node in stock.running.nodes() if node["info"]["role"] == "store")


def _left_s(stock: Stock, node: str, prompt: list[int]) -> float:
    dialect, server = dialect_of(stock.engine.name, (), started=True), stock.server(node)

    def running() -> int:
        answer = httpx.get(f"{server.url}{dialect.load_path}", timeout=ANSWER_TIMEOUT_S, trust_env=False)
        return dialect.figures(answer.content).running

    with closing(stock.running.chunks("left", prompt, OUTPUTS, node, ignore_eos=True)) as chunks:
        for _ in range(LEAVES_AFTER):
            next(chunks)
        if not running():
            raise RuntimeError(f"{server.url} does not say that it runs a step")
    began_s = clock.perf_s()
    while running():
        if clock.perf_s() - began_s > WAIT_S:
            break
    return clock.perf_s() - began_s
