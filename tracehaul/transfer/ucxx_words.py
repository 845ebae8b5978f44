"""What UCXX agents tell each other beneath the notifications of :mod:`.notes`: remote writes made of messages.

A write is announced with its target's rows; its bytes follow in pieces, each a message whose tag is counted up from
the announced one. Both sides cut rows into pieces in the same way.
"""

import ctypes
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from tracehaul.transfer.notes import NOTE_BYTES_MAX, Triples
from tracehaul.wire.errors import TransferError

PIECE_BYTES = 256 << 10
"""Large enough for its cost to vanish, small enough to stay in a core's cache and to let others pass."""
DATA = 1 << 63
"""Set in the tags of pieces; all other messages are envelopes."""
ROWS_MAX = 4096
ADDRESS_BYTES_MAX = 16 << 10
ENVELOPE_BYTES_MAX = NOTE_BYTES_MAX + ROWS_MAX * 16 + 2 * ADDRESS_BYTES_MAX

Bytes = NDArray[np.uint8]


class Noted(msgspec.Struct, frozen=True, tag="note", forbid_unknown_fields=True):
    """A notification."""

    note: bytes


class Write(msgspec.Struct, frozen=True, tag="write", forbid_unknown_fields=True):
    """Pieces follow that belong into ``rows`` of the target's memory."""

    id: int
    """Names the write at the writer."""
    tag: int
    """Of the first piece."""
    rows: bytes
    """See :func:`pack_rows`."""
    note: bytes
    """For the target, once all have landed."""


class Landed(msgspec.Struct, frozen=True, tag="landed", forbid_unknown_fields=True):
    """The answer to a write."""

    id: int


class Refused(msgspec.Struct, frozen=True, tag="refused", forbid_unknown_fields=True):
    """The other answer to a write."""

    id: int
    reason: str


Words = Noted | Write | Landed | Refused


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An agent's metadata: its name, and its worker's address."""

    name: str
    address: bytes


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every message but pieces."""

    name: str
    """The sender's."""
    address: bytes
    checksum: int
    """xxh3-64 of the address: UCX aborts the process when it is given a damaged one."""
    words: Words


_envelope = msgspec.msgpack.Decoder(Envelope)
_peer = msgspec.msgpack.Decoder(Peer)
_encoder = msgspec.msgpack.Encoder()


def pack(name: str, address: bytes, message: Words) -> bytes:
    """Wire form of an envelope."""
    return _encoder.encode(Envelope(name, address, xxh3_64_intdigest(address), message))


def unpack(data: bytes) -> Envelope:
    """Inverse of :func:`pack`.

    Raises:
        TransferError: no peer of this version sends that.
    """
    try:
        envelope = _envelope.decode(data)
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: a key that is not UTF-8
        raise TransferError(f"malformed message: {error}") from error
    if not _sound(envelope.address) or xxh3_64_intdigest(envelope.address) != envelope.checksum:
        raise TransferError("damaged worker address")
    return envelope


def pack_peer(name: str, address: bytes) -> bytes:
    """An agent's metadata; whoever passes it on adds a checksum (see :class:`.notes.AgentPayload`)."""
    return _encoder.encode(Peer(name, address))


def unpack_peer(metadata: bytes) -> Peer:
    """Inverse of :func:`pack_peer`.

    Raises:
        TransferError: it is none.
    """
    try:
        peer = _peer.decode(metadata)
    except (msgspec.MsgspecError, ValueError) as error:
        raise TransferError(f"unusable metadata: {error}") from error
    if not _sound(peer.address):
        raise TransferError("unusable worker address")
    return peer


def pack_rows(rows: Triples) -> bytes:
    """(address, bytes) of each row, as little-endian uint64."""
    return np.ascontiguousarray(rows[:, :2], dtype="<u8").tobytes()


def unpack_rows(data: bytes) -> list[tuple[int, int]]:
    """Inverse of :func:`pack_rows`.

    Raises:
        TransferError: it is none, or has nothing or too much to write.
    """
    if len(data) == 0 or len(data) % 16 or len(data) > ROWS_MAX * 16:
        raise TransferError(f"{len(data)} bytes are no list of rows")
    rows = [(address, nbytes) for address, nbytes in np.frombuffer(data, dtype="<u8").reshape(-1, 2).tolist()]
    if any(nbytes == 0 for _, nbytes in rows):
        raise TransferError("an empty row")
    return rows


def pieces_in(nbytes: NDArray[np.uint64]) -> int:
    """How many pieces rows of these sizes are cut into."""
    return sum(-(-size // PIECE_BYTES) for size in nbytes.tolist())


def cut(rows: Sequence[Bytes]) -> Iterator[Bytes]:
    """Rows in pieces, in order."""
    for row in rows:
        for start in range(0, row.nbytes, PIECE_BYTES):
            yield row[start : start + PIECE_BYTES]


def bytes_at(address: int, nbytes: int) -> Bytes:
    """This process's bytes at an address that stays valid for as long as they are used."""
    return np.frombuffer(memoryview((ctypes.c_char * nbytes).from_address(address)), dtype=np.uint8)


def _sound(address: bytes) -> bool:
    return 0 < len(address) <= ADDRESS_BYTES_MAX
