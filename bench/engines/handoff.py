"""Prefill on one server, decode on another: they meet in the store."""

from statistics import median

from bench.common.report import Result
from bench.engines.stock import BLOCK_TOKENS, Stock, prompts

TOKENS = 4096
OUTPUTS = 16


def handoff(stock: Stock, rounds: int) -> list[Result]:
    """Of each prompt: how much of it the decode worker's server had from the store, and whether what follows the first
    token is what that server says by itself."""
    name = f"engines.{stock.engine.name}.handoff"
    decode, prefill = f"decode-{stock.pool}-0", f"prefill-{stock.pool}-0"
    warm = prompts(1, TOKENS // 4)[0]
    stock.step(decode, "warm", warm, OUTPUTS)
    ttft_s: list[float] = []
    blocks: list[float] = []
    equal = 0
    handed = stock.handed_off(decode)
    for number, prompt in enumerate(prompts(rounds + 1, TOKENS)[1:]):
        step, stored = stock.step(decode, f"handoff-{number}", prompt, OUTPUTS)
        again, _ = stock.step(decode, f"again-{number}", [*prompt, step.tokens[0]], OUTPUTS - 1)
        ttft_s.append(step.ttft_s)
        blocks.append(stored // BLOCK_TOKENS / (len(prompt) // BLOCK_TOKENS))
        equal += step.tokens[1:] == again.tokens
    return [
        Result(f"{name}.ttft", median(ttft_s), "s"),
        Result(f"{name}.steps", (stock.handed_off(decode) - handed) / rounds, "of prompts"),
        Result(f"{name}.blocks", min(blocks), "of full blocks"),
        Result(f"{name}.equal", equal / rounds, "of prompts"),
        Result(f"{name}.prefill.computed", stock.computed(prefill), "tokens"),
    ]
