"""What has become of a trace since it was last written down, and the trace again from that. Pure.

A trace is a value, so what is written is how it differs from the value that was written before: of tokens, texts,
hashes, steps and decisions only what is new, of the rest all. The first change of a trace has all of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from router.fleet.load import Warm
from router.policy.prices import FREE, UNLIMITED, Bill, Limits
from router.policy.retention import Retention
from router.traces.alarms import AlarmKind
from router.traces.asks import Ask
from router.traces.contexts import Left
from router.traces.prefixes import DIGEST_BYTES
from router.traces.rows import LENGTH_BYTES, Rows, unpacked
from router.traces.texts import Text, common_prefix
from router.traces.trace import PinWish, Service, Step, Suspension, Tool, Trace, TraceKey, with_kept
from tracehaul.wire.hashing import TOKEN_BYTES
from tracehaul.wire.hashing import common_prefix as common_tokens
from tracehaul.wire.ids import BlockHash, NodeId, StepId, TraceId

Planned = tuple[tuple[float, AlarmKind], ...]
"""What is to happen to a trace, and when."""


class Clock(msgspec.Struct, frozen=True, array_like=True):
    """What times in a change are told by."""

    boot: str
    """The machine's run; monotonic times of one run compare."""
    now_s: float
    wall_s: float


class Grown(msgspec.Struct, frozen=True, array_like=True):
    """Bytes, from those of before: what stays of them, and what follows."""

    begin: int
    end: int
    more: bytes


class Tail(msgspec.Struct, frozen=True, array_like=True):
    """A run of tokens, texts or hashes: ``shared`` of the one at ``base`` in what was before, and ``more``."""

    base: int
    shared: int
    more: bytes


class LeftChange(msgspec.Struct, frozen=True, array_like=True):
    """As :class:`router.traces.contexts.Left`."""

    step: StepId
    root: BlockHash
    block_tokens: int
    packed: int
    """Which of the change's runs of tokens."""
    hashes: Tail
    published_tokens: int
    warm: Warm | None


class TextChange(msgspec.Struct, frozen=True, array_like=True):
    """As :class:`router.traces.texts.Text`."""

    base: int
    characters: int
    """Of the text at ``base`` in what was before; the same text as bytes: see ``cuts`` and ``turns``."""
    text: str
    packed: int
    shared: int
    rest: bytes
    prompt_end: tuple[int, int]
    generated: bool
    cuts: Tail
    model: str
    turns: Tail
    dated_s: float


class AskChange(msgspec.Struct, frozen=True, array_like=True):
    """One of :mod:`router.traces.asks`."""

    ask: Ask
    """Without its tokens."""
    packed: int
    """Which of the change's runs of tokens."""


class Rest(msgspec.Struct, frozen=True):
    """All else of a trace: as in :class:`router.traces.trace.Trace`."""

    began_s: float
    parent: TraceId | None
    agent: str
    home: NodeId | None
    worker: NodeId | None
    reload_token_s: float
    running: tuple[Step, ...]
    unanswered: tuple[StepId, ...]
    steps_count: int
    last_step: StepId | None
    idle_since_s: float | None
    calls: tuple[str, ...] | None
    service: Service
    suspension: Suspension | None
    retention: Retention | None
    decided: bool
    pin: PinWish | None
    keep_s: float
    ended: bool
    tip: bytes | None
    calls_open: int
    tenant: str = ""
    limits: Limits = UNLIMITED
    bill: Bill = FREE


class Change(msgspec.Struct, frozen=True, array_like=True):
    """What has become of one."""

    follows: int
    """The number of the change before it; 0: nothing was before it, and it has all."""
    clock: Clock
    rest: Rest
    planned: Planned
    runs: tuple[Tail, ...]
    """Tokens: each run once, whoever refers to it."""
    lefts: tuple[LeftChange, ...]
    texts: tuple[TextChange, ...]
    past: Grown
    log: Grown
    counts: tuple[int, int]
    """Of those two's rows."""
    digests: Grown
    children: tuple[TraceId, ...] | None
    """None: as before; likewise what follows."""
    responses: tuple[str, ...] | None
    tools: dict[str, Tool] | None
    editions: dict[str, str] = {}
    """Which edition of each of the texts' models their tokens are of; what is not in it, nobody knows."""
    asks: tuple[AskChange, ...] = ()


_REST = Rest.__struct_fields__
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Change).decode


class Unreadable(Exception):
    """What was written cannot be read."""


def written(
    before: Trace | None, follows: int, trace: Trace, planned: Planned, clock: Clock, editions: Mapping[str, str]
) -> bytes:
    """How a trace differs from what was written of it, ``before`` by the change of that number; None: all.
    ``editions``: of the models, by what they are called."""
    assert (before is None) == (follows == 0)
    old = before or Trace(trace.key, 0.0)
    old_runs, runs = _runs(old), _runs(trace)
    place = {run: at for at, run in enumerate(runs)}
    change = Change(
        follows=follows,
        clock=clock,
        rest=Rest(**{name: getattr(trace, name) for name in _REST}),
        planned=planned,
        runs=tuple(_run(run, old_runs) for run in runs),
        lefts=tuple(
            LeftChange(
                left.step, left.root, left.block_tokens, place[left.packed],
                _tail(left.hashes, [known.hashes for known in old.lefts]), left.published_tokens, left.warm,
            )
            for left in trace.lefts
        ),
        texts=tuple(_text(text, place[text.packed], old.texts) for text in trace.texts),
        past=_grown(old.past.data, trace.past.data, _starts(old.past)),
        log=_grown(old.log.data, trace.log.data, _starts(old.log)),
        counts=(trace.past.count, trace.log.count),
        digests=_digests(old.digests, trace.digests),
        children=None if trace.children == old.children else trace.children,
        responses=None if trace.responses == old.responses else trace.responses,
        tools=None if trace.tools is old.tools else dict(trace.tools),
        editions={text.model: editions[text.model] for text in trace.texts if text.model in editions},
        asks=tuple(AskChange(_holding(ask, b""), place[ask.begun.packed]) for ask in trace.asks),
    )  # fmt: skip
    return _encode(change)


class Read(NamedTuple):
    """A trace as a change tells it."""

    trace: Trace
    planned: Planned
    clock: Clock
    number: int
    """Of that change."""
    follows: int
    """As in :class:`Change`."""
    editions: Mapping[str, str]
    """Likewise."""


def read(key: TraceKey, before: Read | None, number: int, data: bytes) -> Read:
    """A trace again, from what was before and a change of that number.

    Raises:
        Unreadable: it is none, or does not follow ``before``.
    """
    try:
        change = _decode(data)
        if change.follows and (before is None or change.follows != before.number):
            raise Unreadable("what came before it is missing")
        old = before.trace if change.follows and before is not None else Trace(key, 0.0)
        trace = _trace(key, old, change)
    except (msgspec.DecodeError, LookupError, ValueError) as error:
        raise Unreadable(str(error)) from error
    return Read(trace, change.planned, change.clock, number, change.follows, change.editions)


def _trace(key: TraceKey, old: Trace, change: Change) -> Trace:
    old_runs = _runs(old)
    runs = [_run_again(tail, old_runs) for tail in change.runs]
    lefts = [
        Left(
            left.step, left.root, left.block_tokens, runs[left.packed],
            _again(left.hashes, [known.hashes for known in old.lefts]), left.published_tokens, left.warm,
        )
        for left in change.lefts
    ]  # fmt: skip
    texts = [_text_again(text, runs[text.packed], old.texts) for text in change.texts]
    digests = _grown_again(change.digests, b"".join(old.digests))
    trace = Trace(
        key,
        past=Rows(_grown_again(change.past, old.past.data), change.counts[0]),
        log=Rows(_grown_again(change.log, old.log.data), change.counts[1]),
        digests=tuple(digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)),
        children=old.children if change.children is None else change.children,
        responses=old.responses if change.responses is None else change.responses,
        tools=old.tools if change.tools is None else MappingProxyType(change.tools),
        asks=tuple(_holding(ask.ask, runs[ask.packed]) for ask in change.asks),
        **{name: getattr(change.rest, name) for name in _REST},
    )
    return with_kept(trace, lefts, texts)


# --- tokens, texts, hashes --------------------------------------------------------------------------------------


def _runs(trace: Trace) -> list[bytes]:
    """Its runs of tokens, each once."""
    begun = [ask.begun for ask in trace.asks]
    return list(dict.fromkeys(part.packed for part in (*trace.lefts, *trace.texts, *begun)))


def _holding(ask: Ask, packed: bytes) -> Ask:
    return replace(ask, begun=replace(ask.begun, packed=packed))


def _run(run: bytes, known: Sequence[bytes]) -> Tail:
    best, shared = -1, 0
    for at, other in enumerate(known):
        if other is run:
            return Tail(at, len(run), b"")
        common = common_tokens(other, run) * TOKEN_BYTES
        if common > shared:
            best, shared = at, common
    return Tail(best, shared, run[shared:])


def _run_again(tail: Tail, known: Sequence[bytes]) -> bytes:
    if tail.base < 0:
        return tail.more
    base = known[tail.base]
    if not tail.more and tail.shared == len(base):
        return base
    return base[: tail.shared] + tail.more


def _tail(data: bytes, known: Sequence[bytes]) -> Tail:
    """From one that it continues, or with which it shares a beginning that is itself in ``known``."""
    best, shared = -1, 0
    for at, other in enumerate(known):
        if len(other) > shared and data.startswith(other):
            best, shared = at, len(other)
    return Tail(best, shared, data[shared:])


def _again(tail: Tail, known: Sequence[bytes]) -> bytes:
    return _run_again(tail, known)


def _text(text: Text, packed: int, known: Sequence[Text]) -> TextChange:
    best, characters = -1, 0
    for at, other in enumerate(known):
        common = len(text.text) if other is text else common_prefix(other.text, text.text)
        if common > characters:
            best, characters = at, common
    cuts, turns = _tail(text.cuts, [t.cuts for t in known]), _tail(text.turns, [t.turns for t in known])
    return TextChange(
        best, characters, text.text[characters:], packed, text.shared, text.rest, text.prompt_end, text.generated,
        cuts, text.model, turns, text.dated_s,
    )  # fmt: skip


def _text_again(text: TextChange, packed: bytes, known: Sequence[Text]) -> Text:
    begin = known[text.base].text[: text.characters] if text.base >= 0 else ""
    cuts, turns = _again(text.cuts, [t.cuts for t in known]), _again(text.turns, [t.turns for t in known])
    return Text(
        begin + text.text, packed, text.shared, text.rest, text.prompt_end, text.generated,
        cuts, text.model, turns, text.dated_s,
    )  # fmt: skip


# --- what grows at its end and is cut at its beginning ------------------------------------------------------------


def _starts(rows: Rows) -> Iterator[int]:
    at = 0
    while at < len(rows.data):
        yield at
        at += LENGTH_BYTES + int.from_bytes(rows.data[at : at + LENGTH_BYTES], "little")


def _grown(old: bytes, new: bytes, starts: Iterator[int]) -> Grown:
    for start in starts:
        if len(old) - start <= len(new) and new.startswith(old[start:]):
            return Grown(start, len(old), new[len(old) - start :])
    return Grown(0, 0, new)


def _digests(old: tuple[bytes, ...], new: tuple[bytes, ...]) -> Grown:
    before, after = b"".join(old), b"".join(new)
    return _grown(before, after, iter(range(0, len(before), DIGEST_BYTES)))


def _grown_again(grown: Grown, old: bytes) -> bytes:
    return old[grown.begin : grown.end] + grown.more


# --- times ------------------------------------------------------------------------------------------------------


def elapsed_s(then: Clock, now: Clock) -> float:
    """What has passed between, as far as anybody can tell: a wall clock that was put back tells of nothing."""
    return now.now_s - then.now_s if then.boot and then.boot == now.boot else max(0.0, now.wall_s - then.wall_s)


def retimed(trace: Trace, planned: Planned, then: Clock, now: Clock) -> tuple[Trace, Planned]:
    """A trace in the times of another run of the machine."""
    by_s = now.now_s - elapsed_s(then, now) - then.now_s
    if abs(by_s) < 1e-6:
        return trace, planned
    pin, pause = trace.pin, trace.suspension
    trace = replace(
        trace,
        began_s=trace.began_s + by_s,
        running=tuple(replace(step, began_s=step.began_s + by_s) for step in trace.running),
        idle_since_s=None if trace.idle_since_s is None else trace.idle_since_s + by_s,
        pin=None if pin is None else replace(pin, until_s=pin.until_s + by_s),
        suspension=None if pause is None else replace(pause, since_s=pause.since_s + by_s),
        past=_moved(trace.past, _PAST_TIMES, by_s),
        log=_moved(trace.log, _LOG_TIMES, by_s),
        asks=tuple(replace(ask, at_s=ask.at_s + by_s) for ask in trace.asks),
    )
    return trace, tuple((at_s + by_s, kind) for at_s, kind in planned)


_PAST_TIMES = tuple(Step.__struct_fields__.index(name) for name in ("began_s", "ended_s"))
_LOG_TIMES = (1,)
"""See :func:`router.traces.decisions.log_with`."""


def _moved(rows: Rows, places: Sequence[int], by_s: float) -> Rows:
    found = bytearray()
    for row in rows:
        values: list[Any] = unpacked(row)
        for place in places:
            if values[place] is not None:
                values[place] += by_s
        moved = _encode(values)
        found += len(moved).to_bytes(LENGTH_BYTES, "little") + moved
    return Rows(bytes(found), rows.count)
