"""By what a trace is found other than its name: beginnings of conversations, and responses. Pure.

What a trace is found by is a part of the trace; here is the way back from it.
"""

from collections.abc import Iterable, Sequence

from router.traces.prefixes import DIGESTS_MAX
from router.traces.trace import RESPONSES_MAX, Trace, TraceKey
from tracehaul.wire.ids import TraceId


class Lookups:
    """The traces that own digests and responses."""

    def __init__(self) -> None:
        self._owners: dict[bytes, TraceKey] = {}
        self._responses: dict[str, TraceKey] = {}
        self._most = 0
        """Of both there were since the tables were made."""

    def __len__(self) -> int:
        return len(self._owners) + len(self._responses)

    def response(self, salt: str, response: str) -> TraceId | None:
        """The trace in which a tenant was given a response."""
        key = self._responses.get(response)
        return key[1] if key is not None and key[0] == salt else None

    def owner(self, digest: bytes) -> TraceKey | None:
        """The trace that a beginning of a conversation belongs to."""
        return self._owners.get(digest)

    def longest(self, digests: Sequence[bytes]) -> bytes | None:
        """The longest beginning of a conversation that is known."""
        return next((digest for digest in reversed(digests) if digest in self._owners), None)

    def take(self, key: TraceKey, known: tuple[bytes, ...], digests: Sequence[bytes]) -> tuple[bytes, ...]:
        """A trace's digests after a call with these: it owns those that nobody did, and the last one, which it is
        found by, whoever had it first. The caller takes that one from its owner."""
        assert len(digests) <= DIGESTS_MAX
        new = [
            digest
            for at, digest in enumerate(digests)
            if digest not in self._owners or (at == len(digests) - 1 and self._owners[digest] != key)
        ]
        both = (*known, *dict.fromkeys(new))
        self.drop_digests(both[:-DIGESTS_MAX])
        kept = both[-DIGESTS_MAX:]
        self._owners.update(dict.fromkeys(new, key))
        self._most = max(self._most, len(self))
        return kept

    def gave(self, key: TraceKey, known: tuple[str, ...], response: str) -> tuple[str, ...]:
        """A trace's responses after another one; where several traces gave the same, it is the last one's."""
        self._responses[response] = key
        if response in known:
            return known
        both = (*known, response)
        self._drop_responses(key, both[:-RESPONSES_MAX])
        self._most = max(self._most, len(self))
        return both[-RESPONSES_MAX:]

    def drop(self, trace: Trace) -> None:
        """It is gone."""
        self.drop_digests(trace.digests)
        self._drop_responses(trace.key, trace.responses)
        if len(self) < self._most // 4:  # a table never shrinks by itself
            self._owners, self._responses, self._most = dict(self._owners), dict(self._responses), len(self)

    def drop_digests(self, digests: Iterable[bytes]) -> None:
        """Nobody is found by them."""
        for digest in digests:
            self._owners.pop(digest, None)

    def _drop_responses(self, key: TraceKey, responses: Iterable[str]) -> None:
        for response in responses:
            if self._responses.get(response) == key:
                del self._responses[response]

    def check(self, traces: Iterable[Trace]) -> None:
        """Assert that they are those of the traces, and no others."""
        traces = list(traces)
        assert self._owners == {digest: trace.key for trace in traces for digest in trace.digests}
        assert len(self._owners) == sum(len(trace.digests) for trace in traces)
        given = {(response, trace.key) for trace in traces for response in trace.responses}
        assert given >= self._responses.items()
