"""A conversation as a remembered text tells it, message by message. Pure.

A trace only grows: what was run of it stays as it was run, however a client spells it when it sends it back, and the
chat template tells no more than what follows. So a text remembers its messages. An answer that was given here is known
again by what it says: the same text, the same calls with the same arguments.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from router.traces.texts import Text

KEY_BYTES = 8
NO_KEY = bytes(KEY_BYTES)
_TURN = struct.Struct(f"<{KEY_BYTES}s{KEY_BYTES}sI")


class Turn(NamedTuple):
    """One message."""

    sent: bytes
    """Digest of it as a client sends it that changes nothing."""
    says: bytes = NO_KEY
    """Of an answer: digest of what it says, however it is spelled."""
    end: int = 0
    """Characters of the text up to its end, if it is an answer and in the text as the model wrote it."""


class Story(NamedTuple):
    """A call's conversation, to be found in what was remembered."""

    context: bytes
    """Digest of what stands before the messages and decides how they are told: tools, variables of the template."""
    sent: Sequence[bytes]
    """Of each message, as in :class:`Turn`."""
    says: Callable[[int], bytes]
    """Of one of them, as in :class:`Turn`: asked for only where it is needed."""


class Known(NamedTuple):
    """A beginning of a conversation that was run."""

    text: Text
    turns: tuple[Turn, ...]
    """Its messages; the last one is an answer."""

    @property
    def end(self) -> int:
        """Characters of the text that tell it."""
        return self.turns[-1].end


def packed_turns(context: bytes, turns: Iterable[Turn]) -> bytes:
    """For a text to remember."""
    return context + b"".join(_TURN.pack(*turn) for turn in turns)


def with_turn(packed: bytes, turn: Turn) -> bytes:
    """The same and another message."""
    return packed + _TURN.pack(*turn)


def last_turn(packed: bytes) -> Turn | None:
    """The last message of a text; None: it tells no conversation."""
    return Turn._make(_TURN.unpack(packed[-_TURN.size :])) if len(packed) > KEY_BYTES else None


def unpacked_turns(packed: bytes) -> tuple[bytes, list[Turn]]:
    """The context and the turns of a text."""
    return packed[:KEY_BYTES], [Turn._make(turn) for turn in _TURN.iter_unpack(packed[KEY_BYTES:])]


class Difference(NamedTuple):
    """Where a conversation says another thing than one that was run."""

    text: Text
    message: int
    """-1: what stands before the messages differs."""


class Compared(NamedTuple):
    """What remembered texts tell of a conversation."""

    known: Known | None
    """The longest beginning that one of them tells, up to the end of an answer; of equals the first one's."""
    difference: Difference | None
    """From the one that it shares most messages with; None where it continues one, or is a beginning of one."""


def compared(texts: Iterable[Text], model: str, story: Story) -> Compared:
    """``story`` with the texts of that model."""
    known: Known | None = None
    most: Difference | None = None
    goes_on = False
    for text in texts:
        if text.model != model or not text.turns:
            continue
        if text.turns[:KEY_BYTES] != story.context:
            most = most or Difference(text, -1)
            continue
        turns = list(_TURN.iter_unpack(text.turns[KEY_BYTES:]))
        same = _same(turns, story)
        goes_on = goes_on or same in (len(turns), len(story.sent))
        if most is None or same > most.message:
            most = Difference(text, same)
        answers = next((at for at in range(same, 0, -1) if turns[at - 1][2]), 0)
        if answers > (0 if known is None else len(known.turns)):
            known = Known(text, tuple(Turn._make(turn) for turn in turns[:answers]))
    return Compared(known, None if goes_on else most)


def _same(turns: Sequence[tuple[bytes, bytes, int]], story: Story) -> int:
    """How many of its first messages are the same."""
    for at, ((turn_sent, turn_says, _), sent) in enumerate(zip(turns, story.sent, strict=False)):
        if turn_sent != sent and (turn_says == NO_KEY or turn_says != story.says(at)):
            return at
    return min(len(turns), len(story.sent))
