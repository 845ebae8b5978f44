"""A trace's own answers as they outlive the router: what was generated, to be put in place again. Pure.

Only answers, never prompts: the next call of a trace brings its conversation itself.
"""

from typing import Protocol

import msgspec
from blake3 import blake3

from router.traces.texts import Said
from router.traces.trace import TraceKey
from router.traces.turns import last_turn, unpacked_turns
from tracehaul.wire.ids import TraceId

DIGEST_BYTES = 16


class Whose(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What an answer is found by."""

    tenant: str
    trace: TraceId
    heard: str
    """As in :class:`router.traces.events.Answered`; empty: there is none."""

    @property
    def key(self) -> TraceKey:
        """Its trace."""
        return self.tenant, self.trace


class Kept(Whose, frozen=True, gc=False, array_like=True):
    """One answer."""

    model: str
    prompt: bytes
    """Digest of the tokens that it answers."""
    dated_s: float
    """As in :class:`router.traces.texts.Encoded`."""
    context: bytes
    """As in :class:`router.traces.turns.Story`."""
    number: int
    """Which message of its conversation it is."""
    sent: bytes
    """As in :class:`router.traces.turns.Turn`, like the next one."""
    says: bytes
    answer: str
    """As in :class:`router.traces.texts.Said`, like the next one."""
    generated: bytes


def kept(key: TraceKey, said: Said, heard: str | None) -> Kept:
    """An answer that :func:`worth`."""
    context, turns = unpacked_turns(said.turns)
    last = turns[-1]
    return Kept(
        tenant=key[0],
        trace=key[1],
        heard=heard or "",
        model=said.model,
        prompt=digest(said.prompt.packed),
        dated_s=said.prompt.dated_s,
        context=context,
        number=len(turns) - 1,
        sent=last.sent,
        says=last.says,
        answer=said.answer,
        generated=said.generated,
    )


def worth(said: Said) -> bool:
    """It is the whole answer to a conversation."""
    last = last_turn(said.turns)
    return last is not None and last.end > 0


def digest(packed: bytes) -> bytes:
    """Of a prompt's tokens, in wire form."""
    return blake3(packed).digest(DIGEST_BYTES)


class Answers(Protocol):
    """Where answers are kept. Of one event loop."""

    def keep(self, key: TraceKey, said: Said, heard: str | None) -> None:
        """Keep one more, soon; of what cannot be kept nobody hears."""
        ...

    def known(self, key: TraceKey, *, former: bool) -> bool:
        """Whether there are answers of a trace; with ``former``, some of a former life of the router that may not have
        been put in place again."""
        ...

    def heard(self, salt: str, name: str) -> TraceId | None:
        """The trace in which a tenant was given that answer."""
        ...

    async def read(self, key: TraceKey) -> list[Kept]:
        """A trace's answers, in the order in which they were kept; fewer where they cannot be read."""
        ...

    def placed(self, key: TraceKey, *, all_of_them: bool) -> None:
        """They were looked through for a call; ``all_of_them`` are told by the trace's own texts."""
        ...

    def drop(self, key: TraceKey) -> bool:
        """Forget a trace, from now on; False if nothing of it was kept."""
        ...

    def drop_all(self, salt: str) -> None:
        """Forget all traces of a tenant, from now on."""
        ...

    async def dropped(self) -> None:
        """Nothing that was dropped before can be read any more, by whomever."""
        ...


class NoAnswers:
    """Keeps none."""

    def keep(self, key: TraceKey, said: Said, heard: str | None) -> None:
        pass

    def known(self, key: TraceKey, *, former: bool) -> bool:
        return False

    def heard(self, salt: str, name: str) -> TraceId | None:
        return None

    async def read(self, key: TraceKey) -> list[Kept]:
        return []

    def placed(self, key: TraceKey, *, all_of_them: bool) -> None:
        pass

    def drop(self, key: TraceKey) -> bool:
        return False

    def drop_all(self, salt: str) -> None:
        pass

    async def dropped(self) -> None:
        pass
