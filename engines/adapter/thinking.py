"""Answers that are held to a grammar once the model has reasoned, of engines that hold a whole answer or none of it.

Such an answer is asked for twice: its reasoning, up to the token that closes it, and what follows, under the grammar.
Pure.
"""

from typing import NamedTuple

import msgspec

from engines.adapter.dialect import Chunk
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.steps import DecodeStep, Sampling


class Marks(NamedTuple):
    """A model's tokens around its reasoning; None: it has no one token for that."""

    opens: int | None = None
    closes: int | None = None


UNMARKED = Marks()


class Thoughts:
    """The reasoning of one answer, as its tokens come."""

    def __init__(self, marks: Marks, step: DecodeStep) -> None:
        """Of a step whose constraint says that there may be some.

        Raises:
            InvalidRequest: it cannot be told where it ends, or not be kept to what was asked beside it.
        """
        sampling = step.sampling
        assert sampling.constraint is not None
        self._closes, self._opens = marks.closes, marks.opens
        self._may = sampling.constraint.thinking == "may"
        if self._closes is None or (self._may and self._opens is None):
            raise InvalidRequest("this model's reasoning has no token that ends it: it cannot be followed by a grammar")
        if sampling.penalizes:
            raise InvalidRequest("this engine keeps no penalties over an answer's reasoning and the grammar after it")
        self._begun = False
        self.over = False
        """The grammar is next."""

    def ask(self, step: DecodeStep) -> DecodeStep:
        """The step for its reasoning: free, and ended by what closes it."""
        assert self._closes is not None
        stops = (*step.sampling.stop_tokens, self._closes)
        return _with(step, msgspec.structs.replace(step.sampling, constraint=None, stop_tokens=stops))

    def take(self, chunk: Chunk) -> Chunk:
        """What of it belongs to the reasoning: nothing, where the answer begins without any."""
        if not chunk.tokens or self.over:
            return msgspec.structs.replace(chunk, tokens=[], logprobs=None)
        if not self._begun:
            self._begun = True
            if self._may and chunk.tokens[0] != self._opens:
                self.over = True
                return msgspec.structs.replace(chunk, tokens=[], logprobs=None)
        if self._closes not in chunk.tokens:
            return chunk
        self.over = True
        count = chunk.tokens.index(self._closes) + 1
        logprobs = None if chunk.logprobs is None else chunk.logprobs[:count]
        return msgspec.structs.replace(chunk, tokens=chunk.tokens[:count], logprobs=logprobs)


def answer(step: DecodeStep) -> DecodeStep:
    """The step for what follows: under the grammar from its first token on, its prompt scored before."""
    sampling = step.sampling
    assert sampling.constraint is not None
    bare = msgspec.structs.replace(sampling.constraint, thinking="none")
    return msgspec.structs.replace(
        _with(step, msgspec.structs.replace(sampling, constraint=bare)), prompt_logprobs=None
    )


def thinks(sampling: Sampling) -> bool:
    """Whether its constraint lets the model reason first."""
    return sampling.constraint is not None and sampling.constraint.thinking != "none"


def _with(step: DecodeStep, sampling: Sampling) -> DecodeStep:
    return msgspec.structs.replace(step, sampling=sampling)
