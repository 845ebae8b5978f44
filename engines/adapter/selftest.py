"""Whether a server answers from blocks of the store as it does from what it computes, and how fast it computes: asked
of it once, at its start.

No checksum sees that KV was read in another order than it was written in: answers are then fluent, and wrong. So a
prompt is computed, found in the store by the same server, which has nothing of it in its own memory any more, and the
first two tokens of both answers compared.
"""

import asyncio
import secrets
from contextlib import aclosing, suppress
from typing import NamedTuple

from engines.adapter.dialect import Ask, Cached, Dialect, Facts, Figures, Request
from engines.adapter.pace import TOKENS_MIN
from engines.adapter.server import StockServer
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.wire.errors import ClusterError, InvalidRequest, PeerLost
from tracehaul.wire.steps import Sampling, TokenLogprobs

log = Log(__name__)

PROMPT_TOKENS = 320
"""More than the fewest that an engine looks for in its store."""
REPEATED_TOKENS = 8
"""What comes after the prompt is its own beginning again, so that a model attends to what is in the store."""
TOKENS = range(16, 240)
"""Known to any model."""
OUTPUTS = 2
TOP = 5
NEAR = 0.5
"""Logprobs of one token by two ways of computing may differ by so much, by rounding; those of KV that is read wrongly
differ by more, nearly always."""
ANSWER_TIMEOUT_S = 60.0
PAUSE_S = 0.2
TOLD_S = 2.0
"""The longest until a server's figures say what it has computed."""
WARM_PROMPTS = 1
"""A server's first prompt takes longer than those to come: what it compiles and allocates is made with it."""


class Unequal(Exception):
    """A server's answers from the store are others than those that it computes; says in what."""


class Answer(NamedTuple):
    """To the prompt of a self-test."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    cached: Cached


async def prove(server: StockServer, dialect: Dialect, facts: Facts, within_s: float) -> bool:
    """Whether it was seen that answers from the store are as they should be; False: no block came back in time, and
    nothing is known.

    Raises:
        Unequal: they are not.
        ClusterError: the server does not answer.
    """
    nonce, tokens = secrets.token_hex(8), prompt_of(secrets.token_bytes(PROMPT_TOKENS))
    if facts.context_max <= len(tokens) + OUTPUTS:
        return False
    computed = await _ask(server, dialect, facts, nonce, tokens, turn=0)
    until_s = clock.now_s() + within_s
    turn = 1
    while True:
        found = await _ask(server, dialect, facts, nonce, tokens, turn)
        if 2 * dialect.from_store(found.cached) > len(tokens):
            why = difference(computed, found)
            if why is not None:
                raise Unequal(why)
            return True
        if clock.now_s() >= until_s:
            return False
        await asyncio.sleep(PAUSE_S)
        turn += 1


async def timed(server: StockServer, dialect: Dialect, facts: Facts) -> tuple[Figures, Figures] | None:
    """What the server says of its load before and after a prompt that nobody has asked for, once it is warm; None: it
    says nothing new.

    Raises:
        ClusterError: it does not answer.
    """
    before = after = Figures()
    for _ in range(1 + WARM_PROMPTS):
        tokens = prompt_of(secrets.token_bytes(PROMPT_TOKENS))
        if facts.context_max <= len(tokens) + OUTPUTS:
            return None
        before = dialect.figures(await server.get(dialect.load_path, ANSWER_TIMEOUT_S))
        await _ask(server, dialect, facts, secrets.token_hex(8), tokens, turn=0)
        until_s = clock.now_s() + TOLD_S
        while True:
            after = dialect.figures(await server.get(dialect.load_path, ANSWER_TIMEOUT_S))
            if after.prefill_tokens >= before.prefill_tokens + TOKENS_MIN:
                break
            if clock.now_s() >= until_s:
                return None
            await asyncio.sleep(PAUSE_S)
    return before, after


def prompt_of(noise: bytes) -> list[int]:
    """A token for each byte, and the first few of them again."""
    tokens = [TOKENS[byte % len(TOKENS)] for byte in noise]
    return [*tokens, *tokens[:REPEATED_TOKENS]]


def difference(computed: Answer, found: Answer) -> str | None:
    """What tells an answer from the store from the computed one; None: nothing but rounding."""
    for at, (token, own) in enumerate(zip(computed.tokens, computed.logprobs, strict=True)):
        other = found.tokens[at]
        likely = dict(own.top) | {token: own.logprob}
        if other not in likely or own.logprob - likely[other] > NEAR:
            return f"token {at + 1} is {other}, and {token} where the prompt was computed"
        if other != token:
            return None  # a draw; what follows is of another text
        apart = abs(own.logprob - found.logprobs[at].logprob)
        if apart > NEAR:
            return f"the logprob of token {at + 1} differs by {apart:.2f}"
    return None


async def _ask(server: StockServer, dialect: Dialect, facts: Facts, nonce: str, tokens: list[int], turn: int) -> Answer:
    salt, before = dialect.afresh(nonce, turn)
    sampling = Sampling(OUTPUTS, temperature=0.0, min_tokens=OUTPUTS, logprobs=TOP)
    ask = Ask(f"self-test-{nonce}-{turn}", f"self-test-{nonce}", tokens, len(tokens), OUTPUTS, OUTPUTS, sampling, salt)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await _answer(server, dialect, dialect.request(ask, facts), ask, before if turn else None)
    except TimeoutError:
        raise PeerLost(f"no answer to the self-test within {ANSWER_TIMEOUT_S:.0f} s") from None


async def _answer(server: StockServer, dialect: Dialect, request: Request, ask: Ask, before: Request | None) -> Answer:
    if before is not None:
        with suppress(InvalidRequest):  # it is busy, and has what it has: the answer will not be from the store
            await server.post(before, ANSWER_TIMEOUT_S)
    reader, answer, cached = dialect.reader(ask), Answer([], [], Cached(0)), Cached(0)
    async with aclosing(server.events(request)) as events:
        async for data in events:
            chunk = reader.read(data)
            answer.tokens.extend(chunk.tokens)
            answer.logprobs.extend(chunk.logprobs or ())
            cached = chunk.cached or cached
    if len(answer.tokens) != OUTPUTS or len(answer.logprobs) != OUTPUTS:
        raise ClusterError(f"the engine's server answered the self-test with {len(answer.tokens)} tokens")
    return answer._replace(cached=cached)
