"""What makes two calls' steps the same one, asked for twice. Pure.

A call that its client has named is the same if name and body are. Another one is the same as an earlier one of its
trace if that had no answer, and prompt and sampling are the same: a seed counts only where the client has said it.
"""

import msgspec
from blake3 import blake3

from router.traces.asks import NOTHING, Begun
from tracehaul.wire.hashing import checksum
from tracehaul.wire.steps import Sampling

KEYED_S = 86400.0
"""For so long a named call is known."""
UNANSWERED_S = 600.0
"""For so long another one that had no answer."""
NAME_BYTES = 16


class Again(msgspec.Struct, frozen=True):
    """What is known of a step before it runs."""

    name: bytes = b""
    """As :attr:`router.traces.asks.Ask.name`."""
    seed: int | None = None
    """The one that it had; None: it is asked for the first time."""
    begun: Begun = NOTHING


ANEW = Again()
"""It is never asked for again."""


def ask_name(call: str, choice: int, prompt: bytes, sampling: Sampling) -> bytes:
    """As :attr:`router.traces.asks.Ask.name`.

    Args:
        call: the name that its client gave it, with whatever else tells it from others; empty: none.
        choice: which of the prompt's.
        prompt: its tokens, in wire form.
        sampling: the step's.
    """
    if not sampling.seeded:
        sampling = msgspec.structs.replace(sampling, seed=0)
    # Of a trace's few: that two prompts of one length have one checksum is nothing to reckon with.
    told = msgspec.msgpack.encode((call, choice, sampling, len(prompt), checksum(prompt)))
    return blake3(told).digest(NAME_BYTES)
