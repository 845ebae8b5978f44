"""What may be asked again: calls' steps that had no answer, or whose client has named them, with their tokens. Pure.

A token that was sampled is never sampled again: who asks for the same once more goes on behind the last one that is
known of the step, with the seed that it had, or is told all of it.
"""

from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from router.traces.hits import Hits
from tracehaul.wire.ids import StepId
from tracehaul.wire.steps import FinishReason, StepUsage

ASKS_MAX = 64
"""Of one trace: as many as one call may have choices."""
ASKS_BYTES_MAX = 128 * 2**10
"""Of their tokens; of more the oldest are forgotten."""
ASK_BYTES = 400
"""Of one, without its tokens."""


class Begun(msgspec.Struct, frozen=True, gc=False):
    """What a step begins with: what came of it when it was asked for before."""

    packed: bytes = b""
    """Its first tokens, in wire form."""
    ending: FinishReason | None = None
    """These are all, and so it ended; None: others follow."""
    usage: StepUsage | None = None
    """As far as it was known."""
    hits: Hits | None = None


NOTHING = Begun()


class Ask(msgspec.Struct, frozen=True, gc=False):
    """One of them."""

    name: bytes
    """Of what is asked: prompt, sampling, and who calls it what."""
    step: StepId
    """Which ran it last."""
    seed: int
    at_s: float
    """When it was asked last, or what came of it changed."""
    keyed: bool = False
    """Its client has named it, so that it is kept though it was answered."""
    runs: bool = True
    """Under way."""
    begun: Begun = NOTHING


def asked(asks: tuple[Ask, ...], ask: Ask | None) -> tuple[Ask, ...]:
    """With one more, in the place of what is known by its name unless that runs. Of too many the oldest go, but for
    those that run and the last."""
    if ask is None:
        return asks
    found = [one for one in asks if one.runs or one.name != ask.name]
    return _within((*found, ask))


def grown(asks: Sequence[Ask], step: StepId, packed: bytes, now_s: float) -> tuple[Ask, ...]:
    """The step has these tokens by now."""
    return _within(
        tuple(
            replace(ask, at_s=now_s, begun=replace(ask.begun, packed=packed)) if ask.step == step and ask.runs else ask
            for ask in asks
        )
    )


def ended(asks: Sequence[Ask], step: StepId, begun: Begun | None, now_s: float) -> tuple[Ask, ...]:
    """The step does not run any more. None: nobody knows what came of it since it was told of."""
    return _within(
        tuple(
            replace(ask, at_s=now_s, runs=False, begun=ask.begun if begun is None else begun)
            if ask.step == step and ask.runs
            else ask
            for ask in asks
        )
    )


def answered(asks: Sequence[Ask], step: StepId) -> tuple[Ask, ...]:
    """The step's client has all of it: what nobody has named is not to be asked again."""
    return tuple(ask for ask in asks if ask.step != step or ask.keyed)


def find(asks: Sequence[Ask], name: bytes, since_s: float) -> Ask | None:
    """What came of what is asked now; None: it was not asked, or not since then, or it runs."""
    return next((ask for ask in reversed(asks) if ask.name == name and not ask.runs and ask.at_s >= since_s), None)


def size(asks: Sequence[Ask]) -> int:
    """Their memory, about."""
    return sum(ASK_BYTES + len(ask.begun.packed) for ask in asks)


def _within(asks: tuple[Ask, ...]) -> tuple[Ask, ...]:
    count, nbytes = len(asks), sum(len(ask.begun.packed) for ask in asks)
    if count <= ASKS_MAX and nbytes <= ASKS_BYTES_MAX:
        return asks
    kept: list[Ask] = []
    for at, ask in enumerate(asks):
        too_many = count > ASKS_MAX or nbytes > ASKS_BYTES_MAX
        if too_many and not ask.runs and at < len(asks) - 1:
            count, nbytes = count - 1, nbytes - len(ask.begun.packed)
        else:
            kept.append(ask)
    return tuple(kept)
