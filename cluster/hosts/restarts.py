"""When a node that ended is started again. Pure."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cluster.rundir import FAULT_EXIT, FENCED_EXIT

Seconds = Annotated[float, Meta(gt=0)]


class RestartPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How patient a supervisor is."""

    delay_s: Seconds = 1.0
    """Before a node that died is started again. It doubles with each death."""
    delay_max_s: Seconds = 30.0
    settled_s: Seconds = 60.0
    """A node that lived so long has recovered: the next delay is the first again."""
    deaths_max: Annotated[int, Meta(ge=0)] = 5
    """So many deaths within ``window_s`` are borne; with one more the node is given up."""
    window_s: Seconds = 300.0
    again: bool = True
    """False: a node that ended is left alone, whatever it ended with."""


class History(msgspec.Struct, frozen=True):
    """What a supervisor remembers of a node's deaths."""

    died_s: tuple[float, ...] = ()
    """When, of those that count; at most ``deaths_max + 1``."""
    attempts: int = 0
    """Lives in a row that were too short to count as recovered."""


class Again(msgspec.Struct, frozen=True):
    """Start it again after a while."""

    delay_s: float
    state: Literal["backoff", "faulty"]


class Leave(msgspec.Struct, frozen=True):
    """It stays as it is until somebody asks for it."""

    state: Literal["stopped", "fenced", "given up"]


def judge(
    history: History, policy: RestartPolicy, *, exit_code: int | None, lived_s: float, now_s: float, told: bool
) -> tuple[History, Again | Leave]:
    """What becomes of a node that ended.

    ``exit_code``: None where nobody saw it. ``told``: it was told to stop. What an operator must mend is tried again
    for ever, as it may be mended elsewhere (a disk that is mounted late, a port that gets free); what is not understood
    is tried until it has failed too often.
    """
    if told:
        return History(), Leave("stopped")
    if exit_code == FENCED_EXIT:
        return History(), Leave("fenced")
    if not policy.again:
        return History(), Leave("given up")
    attempts = 0 if lived_s >= policy.settled_s else history.attempts
    # The exponent is bounded: 2.0 ** 1024 is no float any more.
    again_s = min(policy.delay_max_s, policy.delay_s * 2.0 ** min(attempts, 64))
    if exit_code == FAULT_EXIT:
        return History(history.died_s, attempts + 1), Again(again_s, "faulty")
    died_s = (*(at_s for at_s in history.died_s if at_s > now_s - policy.window_s), now_s)
    if len(died_s) > policy.deaths_max:
        return History(), Leave("given up")
    return History(died_s, attempts + 1), Again(again_s, "backoff")
