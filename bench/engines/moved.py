"""A step whose server is killed in mid-answer: what its client sees."""

from bench.common.report import Result
from bench.engines.stock import Stock, prompts
from tracehaul.runtime import clock

TOKENS = 1024
OUTPUTS = 96
KILL_AFTER = 24
"""Tokens that the client has when the server is killed."""


def moved(stock: Stock) -> list[Result]:
    """One answer, whole: its tokens, and whether they are those of a step that nothing happened to. The fleet has one
    worker less after it."""
    name = f"engines.{stock.engine.name}.moved"
    (prompt,) = prompts(1, TOKENS)
    stays, dies = f"decode-{stock.pool}-0", f"decode-{stock.pool}-1"
    stock.step(stays, "moved-first", prompt, 1)
    whole, _ = stock.step(stays, "moved-whole", prompt, OUTPUTS)
    tokens: list[int] = []
    gaps_s: list[float] = []
    reasons: list[str] = []
    told_s = clock.perf_s()
    for chunk in stock.running.chunks("moved", prompt, OUTPUTS, dies, ignore_eos=True):
        for choice in chunk["choices"]:
            new = choice.get("token_ids") or []
            if new:
                gaps_s.append(clock.perf_s() - told_s)
                told_s = clock.perf_s()
            if len(tokens) < KILL_AFTER <= len(tokens) + len(new):
                stock.kill(dies)
            tokens += new
            reasons += [choice["finish_reason"]] if choice.get("finish_reason") else []
    same = next(
        (at for at, (one, other) in enumerate(zip(tokens, whole.tokens, strict=False)) if one != other), OUTPUTS
    )
    return [
        Result(f"{name}.whole", float(len(tokens) == OUTPUTS and reasons == ["length"]), "of answers"),
        Result(f"{name}.equal", same / OUTPUTS, "of tokens"),
        Result(f"{name}.gap", max(gaps_s[1:]), "s"),
    ]
