"""The format of a pin journal, and what is left of a pin after a while. Pure.

::

    0     magic and version
    16    frames: length and checksum of the entry, the entry

An entry says all of one trace's pin as of then, or that it ended; the last one of a trace is true. What follows the
first frame that is not whole was being written when the process ended, and counts for nothing.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from kvstore.index.pins import PinKey
from tracehaul.wire.blocks import PinKind
from tracehaul.wire.hashing import HASH_BYTES, checksum
from tracehaul.wire.ids import BlockHash, TraceId

MAGIC = b"tracehaul pins\x01\n"
assert len(MAGIC) == 16
_FRAME = struct.Struct("<IQ")


class Moment(msgspec.Struct, frozen=True, array_like=True):
    """When something was written, by two clocks: the machine's uptime, which is never set, and the wall's."""

    boot: str
    """Names one run of the machine; empty if that is not known."""
    boot_s: float
    """Since its start."""
    wall_s: float


class PinEntry(msgspec.Struct, frozen=True, tag="pin", array_like=True):
    """A pin at one moment."""

    tenant: str
    trace: TraceId
    kind: PinKind
    octaves: float
    """Base 2 logarithm of a soft pin's priority; it loses one in each half-life."""
    remaining_s: float
    at: Moment
    hashes: bytes
    """All that it covers, one after the other."""
    replicas: int = 1
    """Nodes that are to have it."""


class EndEntry(msgspec.Struct, frozen=True, tag="end", array_like=True):
    """A trace's pin is no more."""

    tenant: str
    trace: TraceId


class KeptPin(NamedTuple):
    """A pin as it is now, after a restart."""

    key: PinKey
    kind: PinKind
    octaves: float
    remaining_s: float
    hashes: tuple[BlockHash, ...]
    replicas: int = 1


class Replayed(NamedTuple):
    """What a journal says."""

    pins: list[PinEntry]
    is_whole: bool
    """Whether every byte of it was understood."""


def pack_frame(entry: PinEntry | EndEntry) -> bytes:
    """One entry as it is appended."""
    body = msgspec.msgpack.encode(entry)
    return _FRAME.pack(len(body), checksum(body)) + body


def pack_journal(entries: Iterable[PinEntry]) -> bytes:
    """A whole journal."""
    return b"".join([MAGIC, *map(pack_frame, entries)])


def pack_hashes(hashes: Iterable[BlockHash]) -> bytes:
    """The wire form of what a pin covers."""
    return b"".join(hashes)


def replay(data: bytes) -> Replayed:
    """The pins that were open at the end of ``data``, by the age of their last entry."""
    pins: dict[PinKey, PinEntry] = {}
    if data[: len(MAGIC)] != MAGIC:
        return Replayed([], is_whole=not data)
    decoder = msgspec.msgpack.Decoder(PinEntry | EndEntry)
    view = memoryview(data)
    at = len(MAGIC)
    while at + _FRAME.size <= len(data):
        length, summed = _FRAME.unpack_from(data, at)
        body = view[at + _FRAME.size : at + _FRAME.size + length]
        if body.nbytes != length or checksum(body) != summed:
            break
        try:
            entry = decoder.decode(body)
        except msgspec.MsgspecError:  # another version's
            break
        key = entry.tenant, entry.trace
        pins.pop(key, None)
        if isinstance(entry, PinEntry):
            pins[key] = entry
        at += _FRAME.size + length
    return Replayed(list(pins.values()), is_whole=at == len(data))


def elapsed_s(then: Moment, now: Moment) -> float | None:
    """Time passed, as far as clocks that may be set can tell; None if they contradict each other.

    Within one run of the machine its uptime says it exactly. Over a restart of the machine it is at least what the
    wall's clock says and at least the new uptime; a wall clock that went back says nothing.
    """
    if then.boot and then.boot == now.boot:
        passed_s = now.boot_s - then.boot_s
    else:
        passed_s = now.wall_s - then.wall_s
        if passed_s >= 0 and now.boot:
            passed_s = max(passed_s, now.boot_s)
    return passed_s if passed_s >= 0 else None  # not for NaN either


def survivors(entries: Sequence[PinEntry], now: Moment, half_life_s: float) -> list[KeptPin]:
    """What is left of them. Never more than was granted; nothing of those whose age cannot be known."""
    kept: list[KeptPin] = []
    for entry in entries:
        passed_s = elapsed_s(entry.at, now)
        if passed_s is None:
            continue
        remaining_s = entry.remaining_s - passed_s
        octaves = entry.octaves - passed_s / half_life_s
        if remaining_s > 0 and (octaves > 0 or entry.kind == "hard"):
            raw = entry.hashes
            hashes = [BlockHash(raw[at : at + HASH_BYTES]) for at in range(0, len(raw), HASH_BYTES)]
            key = entry.tenant, entry.trace
            kept.append(KeptPin(key, entry.kind, octaves, remaining_s, tuple(hashes), entry.replicas))
    return kept
