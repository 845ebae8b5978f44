"""A prefix that one server has computed, pulled by another; and the same tokens as where it was computed."""

from statistics import median

from bench.common.report import Result
from bench.engines.stock import BLOCK_TOKENS, Stock, prompts

TOKENS = 4096
WARM_UP_TOKENS = 600
OUTPUTS = 16


def pulled(stock: Stock, rounds: int) -> list[Result]:
    """``engines.ENGINE.pulled``: time to first token of a pull, divided by that of computing it. The two workers take
    turns in who computes."""
    name = f"engines.{stock.engine.name}"
    first, second = nodes = (f"decode-{stock.pool}-0", f"decode-{stock.pool}-1")
    for node, prompt in zip(nodes, prompts(2, WARM_UP_TOKENS), strict=True):
        stock.step(node, f"warm-{node}", prompt, OUTPUTS)  # what the first of all steps pays is no part of this
    for node, prompt in zip(reversed(nodes), prompts(2, WARM_UP_TOKENS), strict=True):
        stock.step(node, f"warm-{node}", prompt, OUTPUTS)
    computed_s: list[float] = []
    pulled_s: list[float] = []
    local_s: list[float] = []
    blocks: list[float] = []
    predicted: list[float] = []
    equal = 0
    for number, prompt in enumerate(prompts(rounds + 1, TOKENS)[1:]):
        here, there = (first, second) if number % 2 == 0 else (second, first)
        cold, _ = stock.step(here, f"cold-{number}", prompt, OUTPUTS)
        other, stored = stock.step(there, f"pulled-{number}", prompt, OUTPUTS)
        local, _ = stock.step(here, f"local-{number}", prompt, OUTPUTS)
        computed_s.append(cold.ttft_s)
        pulled_s.append(other.ttft_s)
        local_s.append(local.ttft_s)
        blocks.append(stored // BLOCK_TOKENS / (len(prompt) // BLOCK_TOKENS))
        predicted.append(other.moved["hits"]["indexed"] / max(1, other.cached_tokens))
        equal += other.tokens == local.tokens
    cold_s = median(computed_s)
    return [
        Result(f"{name}.computed.ttft", cold_s, "s"),
        Result(f"{name}.local.ttft", median(local_s), "s", f"{name}.computed.ttft", median(local_s) / cold_s),
        Result(f"{name}.pulled.ttft", median(pulled_s), "s", f"{name}.computed.ttft", median(pulled_s) / cold_s),
        Result(f"{name}.pulled", median(pulled_s) / cold_s, "1"),
        Result(f"{name}.pulled.blocks", min(blocks), "of full blocks"),
        Result(f"{name}.pulled.predicted", median(predicted), "of cached tokens"),
        Result(f"{name}.pulled.equal", equal / rounds, "of prompts"),
    ]
