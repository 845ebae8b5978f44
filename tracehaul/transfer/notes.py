"""What transports of polled agents tell each other: region payloads, and the notifications of a pull by request.

Over TCP a one-sided write is two to three times as fast as a read, so a pull asks the owner to write: the requester
sends :class:`PullRequest`; the owner writes, and :class:`PullDone` arrives after the bytes. All of it is plain
msgspec from peers that are known but not trusted to be right: every number is checked against a region first.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from tracehaul.transfer.base import Copy
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.errors import TransferError

NOTE_BYTES_MAX = 256 << 10
METADATA_BYTES_MAX = 128 << 10

Triples = NDArray[np.uint64]
"""Rows of (address, bytes, device): how agents name memory."""


class AgentPayload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a region is, in the terms of the agent that registered it."""

    metadata: bytes
    """The agent's own blob: connection addresses and keys."""
    metadata_checksum: int
    """xxh3-64: NIXL, given a damaged blob, cannot load the sound one any more, and UCX aborts the process."""
    region: int
    """Names the region at its owner."""
    address: int
    nbytes: int
    device: int = 0

    def triples(self, offsets: NDArray[np.uint64], nbytes: NDArray[np.uint64]) -> Triples:
        """Rows for ranges of the region; the caller has checked that they are inside."""
        rows = np.empty((len(offsets), 3), dtype=np.uint64)
        rows[:, 0] = offsets + np.uint64(self.address)
        rows[:, 1] = nbytes
        rows[:, 2] = self.device
        return rows


class PullRequest(msgspec.Struct, frozen=True, tag="pull", forbid_unknown_fields=True):
    """Requester -> owner: write these ranges of your region into mine."""

    id: int
    """Names the request at the requester."""
    region: int
    """The owner's region."""
    into: AgentPayload
    """The requester's region."""
    ranges: bytes
    """See :func:`pack_ranges`; local is the requester's side."""


class PullDone(msgspec.Struct, frozen=True, tag="done", forbid_unknown_fields=True):
    """Owner -> requester, behind the bytes: they have all landed."""

    id: int


class PullFailed(msgspec.Struct, frozen=True, tag="failed", forbid_unknown_fields=True):
    """Owner -> requester: not done, and nothing of it is under way."""

    id: int
    reason: str


class Probe(msgspec.Struct, frozen=True, tag="probe", forbid_unknown_fields=True):
    """Requester -> owner: means nothing; that it cannot be sent tells that the owner is gone."""


Note = PullRequest | PullDone | PullFailed | Probe

_note = msgspec.msgpack.Decoder(Note)
_payload = msgspec.msgpack.Decoder(AgentPayload)
_encoder = msgspec.msgpack.Encoder()


def pack(item: Note | AgentPayload) -> bytes:
    """Wire form of a notification or payload."""
    return _encoder.encode(item)


def unpack_note(data: bytes) -> Note:
    """Inverse of :func:`pack`.

    Raises:
        TransferError: no peer of this version sends that.
    """
    if len(data) > NOTE_BYTES_MAX:
        raise TransferError(f"notification of {len(data)} bytes; at most {NOTE_BYTES_MAX}")
    try:
        note = _note.decode(data)
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: a key that is not UTF-8
        raise TransferError(f"malformed notification: {error}") from error
    if isinstance(note, PullRequest):
        check_payload(note.into)
    return note


def make_payload(metadata: bytes, region: int, address: int, nbytes: int) -> AgentPayload:
    """Payload of a region of ours."""
    return AgentPayload(metadata, xxh3_64_intdigest(metadata), region, address, nbytes)


def unpack_payload(remote: RegionDescriptor) -> AgentPayload:
    """What a descriptor of kind ``nixl`` or ``ucxx`` carries.

    Raises:
        TransferError: it is damaged.
    """
    try:
        payload = _payload.decode(remote.payload)
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: a key that is not UTF-8
        raise TransferError(f"unusable descriptor of {remote.owner}: {error}") from error
    check_payload(payload)
    if payload.nbytes != remote.nbytes:
        raise TransferError(f"descriptor of {remote.owner} contradicts itself about its size")
    return payload


def check_payload(payload: AgentPayload) -> None:
    """Raise TransferError if a payload cannot be what an agent made."""
    if len(payload.metadata) > METADATA_BYTES_MAX or xxh3_64_intdigest(payload.metadata) != payload.metadata_checksum:
        raise TransferError("damaged agent metadata")
    end = payload.address + payload.nbytes
    if payload.address < 0 or payload.nbytes < 0 or end >= 1 << 63 or not 0 <= payload.device < 1 << 16:
        raise TransferError("impossible region address")


def pack_ranges(copies: Sequence[Copy]) -> bytes:
    """Copies as rows of three little-endian uint64: local offset, remote offset, bytes."""
    return np.asarray(copies, dtype="<u8").tobytes()


def unpack_ranges(data: bytes, local_nbytes: int, remote_nbytes: int) -> NDArray[np.uint64]:
    """Inverse of :func:`pack_ranges`, as an array of shape ``[copies, 3]`` with every range inside its region.

    Raises:
        TransferError: one is not, or there are none.
    """
    if len(data) == 0 or len(data) % 24:
        raise TransferError(f"{len(data)} bytes are no list of ranges")
    rows = np.frombuffer(data, dtype="<u8").reshape(-1, 3).astype(np.uint64)
    sizes = rows[:, 2]
    for offsets, limit in ((rows[:, 0], local_nbytes), (rows[:, 1], remote_nbytes)):
        # Subtracting from the limit cannot wrap around where adding to an offset could.
        room = np.uint64(limit)
        if bool(np.any(offsets > room)) or bool(np.any(sizes > room - np.minimum(offsets, room))):
            raise TransferError("a range is outside its region")
    return rows
