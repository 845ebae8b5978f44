"""The format of a slot file: a header page, one record per slot, then the slots. Pure.

::

    0        header: magic, version, slot_bytes, slots, checksum
    4096     records: 64 bytes each, padded to a page
    ...      slots: slot_bytes each

A record says what its slot holds. It is written after the slot's bytes and erased (zeros) before they are
overwritten, so a process that is killed at any moment leaves no record of bytes that are not there. Loss of power
may reorder writes that were not flushed; then a record may name bytes that are older or newer than itself, and the
block's own checksum finds that at its first read.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from kvstore.tiers.base import TierBlock
from tracehaul.wire.hashing import HASH_BYTES, checksum
from tracehaul.wire.ids import BlockHash, Checksum

PAGE_BYTES = 4096
RECORD_BYTES = 64
RECORDS_PER_PAGE = PAGE_BYTES // RECORD_BYTES
ERASED = bytes(RECORD_BYTES)

_MAGIC = b"tracehaul slots\n"
_VERSION = 1
_HEADER = struct.Struct("<16sIIQ")
_RECORD = struct.Struct("<16s16sQIIQ")  # hash, parent, checksum of the bytes, size, slot, sequence
_SUM = struct.Struct("<Q")
assert _RECORD.size + _SUM.size == RECORD_BYTES


class Layout(NamedTuple):
    """Where things are in a slot file."""

    slot_bytes: int
    slots_max: int

    @property
    def records_bytes(self) -> int:
        """The record region, in whole pages."""
        return -(-self.slots_max // RECORDS_PER_PAGE) * PAGE_BYTES

    @property
    def data_offset(self) -> int:
        """Where slot 0 starts."""
        return PAGE_BYTES + self.records_bytes

    @property
    def file_bytes(self) -> int:
        """The whole file."""
        return self.data_offset + self.slots_max * self.slot_bytes

    @classmethod
    def within(cls, nbytes: int, slot_bytes: int) -> "Layout | None":
        """The largest layout whose file has at most ``nbytes``; None if that holds no slot."""
        slots = max(0, nbytes - PAGE_BYTES) // (slot_bytes + RECORD_BYTES)
        while slots > 0 and cls(slot_bytes, slots).file_bytes > nbytes:
            slots -= 1
        return cls(slot_bytes, slots) if slots > 0 else None


def pack_header(layout: Layout) -> bytes:
    """The first page of a file."""
    head = _HEADER.pack(_MAGIC, _VERSION, layout.slot_bytes, layout.slots_max)
    return (head + _SUM.pack(checksum(head))).ljust(PAGE_BYTES, b"\0")


def unpack_header(page: bytes) -> Layout | None:
    """What the first page says; None if it is no header of this version."""
    if len(page) < _HEADER.size + _SUM.size:
        return None
    head = page[: _HEADER.size]
    magic, version, slot_bytes, slots = _HEADER.unpack(head)
    (found,) = _SUM.unpack_from(page, _HEADER.size)
    if (magic, version) != (_MAGIC, _VERSION) or found != checksum(head):
        return None
    return Layout(slot_bytes, slots)


class Record(NamedTuple):
    """What one slot holds; of two that name the same block the one with the higher sequence is true."""

    slot: int
    sequence: int
    block: TierBlock


def pack_record(record: Record) -> bytes:
    """Its 64 bytes."""
    block = record.block
    body = _RECORD.pack(block.hash, block.parent, block.checksum, block.size_bytes, record.slot, record.sequence)
    return body + _SUM.pack(checksum(body))


def unpack_records(data: bytes, layout: Layout) -> Iterator[Record | int]:
    """Every record of the region that is not erased; where one is torn or makes no sense, the number of its slot."""
    for slot in range(layout.slots_max):
        raw = data[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES]
        if raw == ERASED:
            continue
        body = raw[: _RECORD.size]
        block_hash, parent, summed, size_bytes, own_slot, sequence = _RECORD.unpack(body)
        whole = raw[_RECORD.size :] == _SUM.pack(checksum(body))
        if not whole or own_slot != slot or not 0 < size_bytes <= layout.slot_bytes or block_hash == parent:
            yield slot
        else:
            block = TierBlock(BlockHash(block_hash), BlockHash(parent), size_bytes, Checksum(summed))
            yield Record(slot, sequence, block)


assert HASH_BYTES == 16, "a record has room for exactly this"
