"""How many steps of the background the fleet has room for. Pure.

A cap is granted on lease: it counts what workers said of themselves a moment ago, and ends when that is too old to be
believed. A worker lets others go first within an iteration, so that the cap only bounds what it holds for the
background: ever less the more others compute there, nothing while steps wait for memory or prompts for their turn.
"""

from collections.abc import Iterable
from typing import NamedTuple

STALE_S = 2.5
"""What a worker said of itself counts for so long: two heartbeats and some slack."""
PLACES = 8
"""Steps of the background on a decode worker that has nothing else to do."""
QUEUE_S_MAX = 1.0
"""Where a prompt waits for its turn for longer, nothing is added."""


class Seen(NamedTuple):
    """One decode worker."""

    heard_s: float
    front: int
    """Steps in progress that are not of the background."""
    own: int
    """Steps of the background that this router sent there."""
    background: int
    """As many as the worker says there are of all routers."""
    waiting: int
    """Steps that wait for memory."""
    queue_s: float
    """How long a prompt waits for its turn."""


class Slack(NamedTuple):
    """A cap."""

    steps: int
    """Of the background in progress, of this router's."""
    until_s: float
    """When it ends; it is none then."""


def places(seen: Seen) -> int:
    """On one worker."""
    if seen.waiting or seen.queue_s > QUEUE_S_MAX:
        return 0
    room = PLACES // (1 + seen.front)
    if seen.background <= max(room, seen.own):
        return room
    return min(room, max(1, seen.own * room // seen.background))  # several routers share it by what they have


def slack(workers: Iterable[Seen], now_s: float) -> Slack:
    """Of all of them; nothing where none was heard of late."""
    fresh = [seen for seen in workers if now_s < seen.heard_s + STALE_S]
    until_s = min((seen.heard_s for seen in fresh), default=now_s) + STALE_S
    return Slack(sum(map(places, fresh)), until_s)
