"""Where stock stacks send a call, each worker's caches being its own. Pure.

Both may use what such routers use: the session that a header names, the prompt, and what they have sent where and has
not ended. Neither knows what a worker has evicted.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from blake3 import blake3

PIECE = 256
"""Bytes of a prompt that are known, or not, as one."""
MATCH_MIN = 0.3
"""A worker that is known to have less of a prompt than this share of it has no claim to it."""
APART, TIMES = 6, 1.5
"""The fleet is out of balance where the busiest worker has so many calls more than the idlest, and so many times its
calls: then the idlest gets the call."""


class Routing(Protocol):
    """A rule."""

    def choose(self, session: bytes | None, prompt: bytes, running: Sequence[int]) -> int:
        """The worker of a call. ``running``: how many calls each has now."""
        ...


class Alone:
    """There is one worker, or a router of its own behind it."""

    def choose(self, session: bytes | None, prompt: bytes, running: Sequence[int]) -> int:
        return 0


class Sticky:
    """A session stays where its first call went: to the worker with the fewest calls then, of these to the one with the
    fewest sessions."""

    def __init__(self, workers: int) -> None:
        self._sessions: dict[bytes, int] = {}
        self._has = [0] * workers

    def choose(self, session: bytes | None, prompt: bytes, running: Sequence[int]) -> int:
        if session is not None and session in self._sessions:
            return self._sessions[session]
        chosen = min(range(len(running)), key=lambda worker: (running[worker], self._has[worker]))
        if session is not None:
            self._sessions[session] = chosen
            self._has[chosen] += 1
        return chosen


class CacheAware:
    """The longest matching prefix has the call, as SGLang's router has it: unless the fleet is out of balance, or
    nobody has much of it; then the idlest worker. ``pieces_max``: those remembered of each worker, the last used."""

    def __init__(self, workers: int, pieces_max: int) -> None:
        self._had: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(workers)]
        self._pieces_max = pieces_max

    def choose(self, session: bytes | None, prompt: bytes, running: Sequence[int]) -> int:
        pieces = chained(prompt)
        chosen = self._best(pieces, running)
        had = self._had[chosen]
        for piece in reversed(pieces):  # the beginnings are forgotten last
            had[piece] = None
            had.move_to_end(piece)
        while len(had) > self._pieces_max:
            had.popitem(last=False)
        return chosen

    def _best(self, pieces: Sequence[bytes], running: Sequence[int]) -> int:
        workers = range(len(running))
        idlest = min(workers, key=lambda worker: (running[worker], len(self._had[worker])))
        most = max(running)
        if most - running[idlest] > APART and most > TIMES * running[idlest]:
            return idlest
        matches = [self._match(worker, pieces) for worker in workers]
        longest = max(matches)
        if not pieces or longest < MATCH_MIN * len(pieces):
            return idlest
        return min((worker for worker in workers if matches[worker] == longest), key=lambda worker: running[worker])

    def _match(self, worker: int, pieces: Sequence[bytes]) -> int:
        had = self._had[worker]
        return next((at for at, piece in enumerate(pieces) if piece not in had), len(pieces))


def chained(prompt: bytes) -> list[bytes]:
    """A name for each whole piece of a prompt and all that is before it."""
    hasher, names = blake3(), list[bytes]()
    for at in range(0, len(prompt) - PIECE + 1, PIECE):
        hasher.update(prompt[at : at + PIECE])
        names.append(hasher.digest(16))
    return names
