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


def known(texts: Iterable[Text], model: str, story: Story) -> Known | None:
    """The longest beginning of ``story`` that one of ``texts`` tells, up to the end of an answer; of equals from the
    first one. None if none does."""
    best: Known | None = None
    for text in texts:
        if text.model != model or text.turns[:KEY_BYTES] != story.context:
            continue
        turns = _shared(text.turns, story)
        if turns and (best is None or len(turns) > len(best.turns)):
            best = Known(text, turns)
    return best


class Difference(NamedTuple):
    """Where a conversation says another thing than one that was run."""

    text: Text
    message: int
    """-1: what stands before the messages differs."""


def difference(texts: Iterable[Text], model: str, story: Story) -> Difference | None:
    """From the text that it shares most messages with; None if it continues one, is a beginning of one, or none is
    there to compare with."""
    most: Difference | None = None
    for text in texts:
        if text.model != model or not text.turns:
            continue
        at = -1 if text.turns[:KEY_BYTES] != story.context else _same(text.turns, story)
        if at in ((len(text.turns) - KEY_BYTES) // _TURN.size, len(story.sent)):
            return None
        if most is None or at > most.message:
            most = Difference(text, at)
    return most


def _same(packed: bytes, story: Story) -> int:
    """How many of its first messages are the same."""
    count = 0
    for count, (turn, sent) in enumerate(zip(unpacked_turns(packed)[1], story.sent, strict=False)):
        if turn.sent != sent and (turn.says == NO_KEY or turn.says != story.says(count)):
            return count
    return min((len(packed) - KEY_BYTES) // _TURN.size, len(story.sent))


def _shared(packed: bytes, story: Story) -> tuple[Turn, ...]:
    """The turns up to the last answer that both have."""
    turns = unpacked_turns(packed)[1][: _same(packed, story)]
    while turns and not turns[-1].end:
        turns.pop()
    return tuple(turns)
