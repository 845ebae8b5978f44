"""What steps said whose router was lost: for a while another one gets it, and what follows. Pure.

Closing a stream frees its step, and what was sampled for it is known to who closed it. A router that dies knows nothing
any more, so its workers do: what each of its steps has said, not what it would have said. The next router is told that,
in its place, and then the rest.
"""

from collections import OrderedDict
from dataclasses import dataclass

from msgspec.structs import replace

from tracehaul.wire.spent import Reading
from tracehaul.wire.steps import FinishReason, StepDone, StepUsage

LATELY_S = 10.0
"""A router writes down how a step has ended within so long after it did, where its database keeps up."""
LEASE_S = 60.0
"""For so long the next router may come."""
ANSWERS_MAX = 2048
BYTES_MAX = 16 * 2**20
"""Of their tokens."""


@dataclass(frozen=True)
class Said:
    """What a step has said by its end."""

    packed: bytes
    """Its output, in wire form."""
    usage: StepUsage
    reason: FinishReason | None = None
    """Nothing follows; None: it was cut off."""
    retained_tokens: int = 0
    published_tokens: int = 0

    @property
    def done(self) -> StepDone | None:
        """Its terminal message."""
        if self.reason is None:
            return None
        return StepDone(self.reason, self.usage, self.retained_tokens, self.published_tokens)


@dataclass(frozen=True)
class _Kept:
    peer: str
    said: Said
    at_s: float
    """When it ended, or its router was lost."""


class Orphans:
    """One worker's."""

    def __init__(self) -> None:
        self._lately: OrderedDict[bytes, _Kept] = OrderedDict()
        """Those whose routers are there, as they ended."""
        self._lost: OrderedDict[bytes, _Kept] = OrderedDict()
        """Those whose routers are not, as these were lost."""
        self._nbytes = 0

    def ended(self, name: bytes, peer: str, said: Said, now_s: float) -> None:
        """A step of that router, by its connection, has ended, whatever way."""
        self._drop(self._lately, name)
        self._drop(self._lost, name)
        self._nbytes += len(said.packed)
        self._lately[name] = _Kept(peer, said, now_s)
        self._expire(now_s)

    def lost(self, peer: str, now_s: float) -> bool:
        """That router's connection is gone, and none of its steps runs. Whether there is something that it may not know
        to have been said."""
        self._expire(now_s)
        theirs = [name for name, kept in self._lately.items() if kept.peer == peer]
        for name in theirs:
            self._lost[name] = _Kept(peer, self._lately.pop(name).said, now_s)
        return bool(theirs)

    def find(self, name: bytes, peer: str, emitted: bytes, now_s: float) -> Said | None:
        """What was said of a step beyond ``emitted``, if the router that asks for it, by its connection, is another
        than the one that was told; with that it is this one's."""
        self._expire(now_s)
        kept = self._lost.get(name) or self._lately.get(name)
        if kept is None or (name in self._lately and (kept.peer == peer or kept.said.reason is not None)):
            return None
        said = kept.said
        more = len(said.packed) > len(emitted) or said.reason is not None
        return said if more and said.packed.startswith(emitted) else None

    def names(self, now_s: float) -> tuple[bytes, ...]:
        """Of those whose routers are lost."""
        self._expire(now_s)
        return tuple(self._lost)

    def _expire(self, now_s: float) -> None:
        for kept, keep_s in ((self._lately, LATELY_S), (self._lost, LEASE_S)):
            while kept and next(iter(kept.values())).at_s + keep_s < now_s:
                self._drop(kept, next(iter(kept)))
        while self._nbytes > BYTES_MAX or len(self._lately) + len(self._lost) > ANSWERS_MAX:
            oldest = self._lately or self._lost
            self._drop(oldest, next(iter(oldest)))

    def _drop(self, kept: OrderedDict[bytes, _Kept], name: bytes) -> None:
        if name in kept:
            self._nbytes -= len(kept.pop(name).said.packed)


def uncharged(usage: StepUsage) -> StepUsage:
    """Without what it took: its own router bills that, or who has its trace then."""
    return replace(usage, reading=Reading(), prefill_reading=Reading())
