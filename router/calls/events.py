"""What happens in a call, in no dialect's form. Pure.

Of each choice: one :class:`Begun`, any number of :class:`Piece`, one :class:`Ended`. All its pieces together are its
:class:`Choice`.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from router.policy.prices import FREE, Bill
from router.traces.hits import Hits
from tracehaul.wire.steps import FinishReason, TokenLogprobs


class SaidCall(msgspec.Struct, frozen=True, gc=False):
    """What a piece of text adds to one call of a tool."""

    index: int
    id: str | None
    """With the first piece of a call, as the name is."""
    name: str | None
    arguments: str
    custom: bool = False
    """It is a custom tool's: ``arguments`` are the text that it takes."""


class Said(msgspec.Struct, frozen=True, gc=False):
    """What a piece of text adds to an answer, in this order."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[SaidCall, ...] = ()


NOTHING = Said()


def joined(first: Said, then: Said) -> Said:
    """Two pieces that follow each other, as one."""
    return Said(first.reasoning + then.reasoning, first.content + then.content, first.calls + then.calls)


class Mark(msgspec.Struct, frozen=True, gc=False):
    """One token, where its text starts in the answer, and how likely it was; None where nothing precedes it."""

    token: int
    offset: int
    logprobs: TokenLogprobs | None


class Opening(msgspec.Struct, frozen=True, gc=False):
    """What a choice begins with: its prompt, as far as the call wants it told."""

    text: str = ""
    marks: Sequence[Mark] = ()
    prompt_ids: list[int] | None = None


class Compared(msgspec.Struct, frozen=True, gc=False):
    """How a call's prompt stands to that of an answer, its baseline."""

    outcome: Literal["same", "unknown", "elsewhere", "model", "tools", "variables", "system", "messages"]
    """It is the same, as far as that went; the answer is not known, or of a trace that this call has nothing to do
    with; or the first thing that the client changed, as in :class:`router.traces.hits.Changed`."""
    tokens: int = 0
    """What is of no use because of a change: of the trace's context, in tokens."""


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of a call, and where its prompts' KV came from, summed over the choices."""

    prompt_tokens: int
    """A prompt counts once, whatever its choices are."""
    cached_tokens: int
    """Of those, the ones that nobody in the cluster computed for this call."""
    output_tokens: int
    reasoning_tokens: int
    """Output tokens up to the end of the reasoning."""
    resident_tokens: int
    pulled_tokens: int
    pulled_bytes: int
    pull_s: float
    missed_blocks: int
    prefill_fallback: str
    hits: Hits
    bill: Bill = FREE
    unit: str = ""
    """Of what things cost."""
    compared: Compared | None = None
    """None: nothing was to be compared."""


class Begun(msgspec.Struct, frozen=True, gc=False):
    """A choice begins."""

    choice: int
    opening: Opening
    usage: Usage | None = None
    """Of the call after this, where it is wanted with each event or with this one."""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """A choice goes on, perhaps by nothing that can be shown yet."""

    choice: int
    said: Said
    tokens: list[int]
    marks: Sequence[Mark]
    """One for each of ``tokens``, if logprobs are asked for."""
    usage: Usage | None = None


class Ended(msgspec.Struct, frozen=True, gc=False):
    """A choice ends."""

    choice: int
    reason: FinishReason
    called: bool
    """It has called tools, and all that was told of calls is complete: their arguments are objects."""
    usage: Usage | None = None
    stop: str | None = None
    """The stop string that ended it; None: something else did."""


CallEvent = Begun | Piece | Ended


class Choice(msgspec.Struct, frozen=True, gc=False):
    """A whole choice; the calls in ``said`` are in one piece each."""

    opening: Opening
    said: Said
    tokens: list[int]
    marks: Sequence[Mark]
    reason: FinishReason
    called: bool
    """The same of :attr:`said`."""
    stop: str | None = None
    """As in :class:`Ended`."""
