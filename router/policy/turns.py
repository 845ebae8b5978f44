"""Which of the steps that wait go to workers next, and when. Pure.

A step that is sent to a worker without room for it waits there behind what came before it, whatever that is, and its
place is decided long before its turn. So steps wait in front of the workers: the next one goes as soon as a worker has
memory for it and has next to nothing to compute before it, and is placed then.
"""

from math import inf
from typing import Generic

import numpy as np

from router.fleet.load import WorkerTable
from router.policy.order import STRETCH, Name, Order, Stretch, Waiter

MEMORY_SHARE = 0.95
"""Of a worker's memory, that steps in progress may have when another one is sent."""
QUEUE_S = 5.0
"""So much may be there to be computed before it."""
HEADROOM_TOKENS = 256
HEADROOM_SHARE = 1 / 32
"""What a step needs beside its prompt to get on: so many, or that share of the memory if that is less."""
STALLED_S = 10.0
"""The next one goes whatever there is to be said against it when nothing has gone or ended for so long: workers know
better how much they hold, and refuse what is too much."""


class Turns(Generic[Name]):
    """Of the steps of one pool, by name."""

    def __init__(self, stretch: Stretch = STRETCH) -> None:
        self.order = Order[Name](stretch)
        self._tokens: dict[Name, int] = {}
        self._moved_s = -inf

    def join(self, name: Name, waiter: Waiter, tokens: int) -> None:
        """A step of so many tokens waits for its turn."""
        if not len(self.order):
            self._moved_s = waiter.came_s
        self.order.join(name, waiter)
        self._tokens[name] = tokens

    def leave(self, name: Name) -> None:
        """It waits no more, and has not gone. Leaving twice is harmless."""
        self.order.leave(name)
        self._tokens.pop(name, None)

    def moved(self, now_s: float) -> None:
        """A step has ended."""
        self._moved_s = now_s

    def next(self, decodes: WorkerTable, prefills: WorkerTable, now_s: float) -> Name | None:
        """Who goes now, to be sent before this is asked again; None: nobody."""
        name = self.order.first(now_s)
        if name is None:
            return None
        if not has_room(decodes, prefills, self._tokens[name], now_s) and now_s < self._moved_s + STALLED_S:
            return None
        self.order.goes(name)
        del self._tokens[name]
        self._moved_s = now_s
        return name


def has_room(decodes: WorkerTable, prefills: WorkerTable, tokens: int, now_s: float) -> bool:
    """Whether a step of so many tokens need not wait at the worker that suits it best."""
    if not len(decodes):
        return True
    memory = MEMORY_SHARE * decodes.kv_tokens - np.minimum(HEADROOM_TOKENS, HEADROOM_SHARE * decodes.kv_tokens)
    fits = (decodes.sent_tokens + tokens <= memory) | (decodes.kv_tokens == 0) | (decodes.running_steps == 0)
    if not fits.any():
        return False
    waits_s = decodes.queue_s(now_s)[fits].min()
    if len(prefills):
        waits_s = min(waits_s, prefills.queue_s(now_s).min())
    return bool(waits_s <= QUEUE_S)


def served_s(decodes: WorkerTable, computed: int, decoded: int) -> float:
    """What so many tokens have taken of workers' time, about: of a prompt, and generated in such batches as now."""
    if not len(decodes):
        return 0.0
    batch = max(1.0, float(decodes.decoding.mean()))
    return computed * float(decodes.token_s.mean()) + decoded * float(decodes.decode_s.mean()) / batch
