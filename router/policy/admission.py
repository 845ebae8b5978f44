"""Which traces may begin. Pure.

A trace is admitted as a whole: none of its later steps waits for another trace's first. What is foreseen is thrash. The
contexts of traces that reason (a step of theirs runs or waits) want KV memory of workers now; those of traces that act
want it soon, the less the longer they have been idle. Where together they want more than there is, each step costs
another one its context. So the gate closes shortly before that, and opens again when there is some room.

Who is refused is told when to come back, and has a place in the order until then: tenants by what each of them has
going for its calls' weight, then who came first. It is told to come before it is expected to begin: memory that has
become free must not wait for anybody.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from router.policy.line import Line
from router.policy.pace import Pace

WAIT_MIN_S = 1.0
RETRY_SHARE = 0.7
"""Of the time to its expected start, when one that is refused should come back."""
RETRY_MAX_S = 60.0
"""So long is waited by clients that are told so, such as the SDKs of OpenAI and Anthropic, and not for longer."""
GROWN_SHARE = 0.8
"""Traces that just began grow: all that go count for no less than this of what as many usually want."""
IDLE_S = 900.0
"""A trace that did nothing for so long is going no more, whatever it does then."""
RENORMALISED_S = 600.0


class AdmissionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When traces may begin."""

    enabled: bool = True
    close_share: Annotated[float, Meta(gt=0)] = 0.85
    """Of the memory: no trace begins while as much is wanted."""
    open_share: Annotated[float, Meta(gt=0)] = 0.75
    """Traces begin again when no more than that is wanted."""
    half_life_s: Annotated[float, Meta(gt=0)] = 5.0
    """A context that nothing is done with wants half as much of the workers' memory after so long."""
    stored_half_life_s: Annotated[float, Meta(gt=0)] = 60.0
    """The same of the stores' memory."""

    def __post_init__(self) -> None:
        if self.open_share > self.close_share:
            raise ValueError("open_share must not be above close_share")


class Refusal(NamedTuple):
    """Of a trace that may not begin now; in seconds."""

    retry_s: float
    """When it should ask again, at the latest: what is foreseen may be wrong."""
    start_s: float
    """When it is expected to begin."""


class Memory(NamedTuple):
    """What there is, in tokens of KV."""

    workers: float
    stores: float
    """Their memory; 0: there is none, or it is not used."""


class _Fading:
    """A sum of weights of which each halves in the same time, since it was added. O(1) each way."""

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._since_s = 0.0
        self._sum = 0.0
        """As of ``_since_s``."""

    def add(self, weight: float, since_s: float, now_s: float) -> None:
        """A weight that began to fade at ``since_s``; a negative one takes it back."""
        if now_s - self._since_s > RENORMALISED_S:
            self._sum, self._since_s = self.at(now_s), now_s
        self._sum = max(0.0, self._sum + weight * 2.0 ** ((since_s - self._since_s) / self._half_life_s))

    def at(self, now_s: float) -> float:
        """What is left of it."""
        return self._sum * 2.0 ** ((self._since_s - now_s) / self._half_life_s)


@dataclass
class _Member:
    tenant: str
    since_s: float
    """When it began to act, or was let in."""
    tokens: float = 0.0
    running: int = 0
    let_in_s: float | None = None
    """When it was; None: it did not ask."""
    acting: bool = False


class Admission:
    """The gate of one fleet. Keys name traces; those that other traces started need not ask."""

    def __init__(self, config: AdmissionConfig) -> None:
        self._config = config
        self._memory = Memory(0.0, 0.0)
        self._members: OrderedDict[Hashable, _Member] = OrderedDict()
        """Those that did something last are last."""
        self._going: dict[str, int] = {}
        """Traces that were let in, by tenant."""
        self._reasoning = 0.0
        self._acting = _Fading(config.half_life_s)
        self._stored = _Fading(config.stored_half_life_s)
        self._closed = False
        self._line = Line()
        self._pace = Pace((config.open_share + config.close_share) / 2)
        self._let_in = 0
        """Of those that go, how many had to ask."""
        self.refused = 0

    def __len__(self) -> int:
        """Traces that were let in and are not over."""
        return len(self._members)

    @property
    def waiting(self) -> int:
        """Traces that were told to come back."""
        return len(self._line)

    def resize(self, memory: Memory) -> None:
        """The fleet has so much memory now."""
        self._memory = memory

    def wanted(self, now_s: float) -> float:
        """Of the memory, by what is let in; above 1: more than there is."""
        workers, stores = self._memory
        if workers <= 0:
            return 0.0  # nothing is known of it
        here = (self._reasoning + self._acting.at(now_s)) / workers
        if not stores:
            return here
        return max(here, (self._reasoning + self._stored.at(now_s)) / (workers + stores))

    def ask(self, key: Hashable, now_s: float, tenant: str = "", weight: float = 1.0) -> Refusal | None:
        """A trace would begin, of a class of such a weight: None if it may, and its step begins next."""
        self._prune(now_s)
        self._passes(now_s)
        if key in self._members:
            return None
        if not self._config.enabled or self._may(key, now_s, tenant, weight):
            if len(self._line):
                self._pace.began(now_s)
            self._line.leave(key)
            self._joins(key, tenant, now_s).let_in_s = now_s
            self._let_in += 1
            return None
        self.refused += 1
        return self._refuse(key, now_s, tenant, weight)

    def begins(self, key: Hashable, tokens: float, now_s: float, tenant: str = "") -> None:
        """A step of it does, with such a prompt."""
        self._passes(now_s)
        member = self._members.get(key)
        if member is None:
            member = self._joins(key, tenant, now_s)
        self._members.move_to_end(key)
        self._rests(member, now_s)
        self._reasoning -= member.tokens if member.running else 0.0
        member.running += 1
        member.tokens = max(tokens, member.tokens if member.running > 1 else 0.0)
        self._reasoning += member.tokens

    def ends(self, key: Hashable, tokens: float, now_s: float) -> None:
        """A step of it has ended, and left a context of so many tokens."""
        self._passes(now_s)
        member = self._members.get(key)
        if member is None or not member.running:
            return
        member.running -= 1
        if not member.running:
            self._reasoning = max(0.0, self._reasoning - member.tokens)
            member.tokens, member.since_s, member.acting = tokens, now_s, True
            self._acting.add(tokens, now_s, now_s)
            self._stored.add(tokens, now_s, now_s)

    def forget(self, key: Hashable) -> None:
        """Who was told to come back will not."""
        self._line.leave(key)

    def over(self, key: Hashable, now_s: float) -> None:
        """The trace has ended, or was forgotten."""
        self._passes(now_s)
        member = self._members.pop(key, None)
        if member is None:
            return
        if member.let_in_s is not None:
            self._let_in -= 1
            self._pace.ended(now_s - member.let_in_s, now_s)
        self._rests(member, now_s)
        if member.running:
            self._reasoning = max(0.0, self._reasoning - member.tokens)
        self._going[member.tenant] -= 1
        if not self._going[member.tenant]:
            del self._going[member.tenant]

    def _joins(self, key: Hashable, tenant: str, now_s: float) -> _Member:
        member = self._members[key] = _Member(tenant, now_s)
        self._going[tenant] = self._going.get(tenant, 0) + 1
        return member

    def _passes(self, now_s: float) -> None:
        if now_s > self._pace.as_of_s:  # what is told of the past changes nothing of it
            self._pace.passes(self._let_in, self.wanted(now_s), now_s)

    def _prune(self, now_s: float) -> None:
        while self._members:
            key, first = next(iter(self._members.items()))
            if first.running or now_s - first.since_s < IDLE_S:
                return
            self.over(key, now_s)

    def _rests(self, member: _Member, now_s: float) -> None:
        """It acts no more."""
        if member.acting:
            self._acting.add(-member.tokens, member.since_s, now_s)
            self._stored.add(-member.tokens, member.since_s, now_s)
            member.acting = False

    # --- who is next ------------------------------------------------------------------------------------------

    def _may(self, key: Hashable, now_s: float, tenant: str, weight: float) -> bool:
        wanted = max(self.wanted(now_s), GROWN_SHARE * self._pace.usual_share(self._let_in))
        self._closed = wanted > (self._config.open_share if self._closed else self._config.close_share)
        return not self._closed and not self._line.awaits(key, now_s, self._rank(tenant, weight), self._rank)

    def _refuse(self, key: Hashable, now_s: float, tenant: str, weight: float) -> Refusal:
        before = self._line.before(key, now_s, (tenant, weight), self._rank)
        if not len(self._line):
            self._pace.waits(now_s)
        start_s = max(self._pace.start_s(before, self._let_in, now_s), WAIT_MIN_S)
        retry_s = min(max(RETRY_SHARE * start_s, WAIT_MIN_S), RETRY_MAX_S)
        self._line.told(key, (tenant, weight), now_s + retry_s)
        return Refusal(retry_s, start_s)

    def _rank(self, tenant: str, weight: float) -> float:
        return (self._going.get(tenant, 0) + 1) / weight
