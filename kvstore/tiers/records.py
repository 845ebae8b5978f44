"""The format of a slot file: a header page, the slots, then one record per slot. Pure.

::

    0        header: magic, version, slot_bytes, slots, checksum
    4096     slots: slot_bytes each
    ...      records: 64 bytes each, padded to a page

So a file that grows or shrinks leaves its slots where they are.

A record says what its slot holds. It is written after the slot's bytes and erased (zeros) before they are
overwritten, so a process that is killed at any moment leaves no record of bytes that are not there. Loss of power
may reorder writes that were not flushed; then a record may name bytes that are older or newer than itself, and the
block's own checksum finds that at its first read.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from kvstore.index.tenants import TenantKey
from kvstore.tiers.base import TierBlock
from tracehaul.wire.hashing import HASH_BYTES, checksum
from tracehaul.wire.ids import BlockHash, Checksum

PAGE_BYTES = 4096
RECORD_BYTES = 64
RECORDS_PER_PAGE = PAGE_BYTES // RECORD_BYTES
ERASED = bytes(RECORD_BYTES)

_MAGIC = b"tracehaul slots\n"
_VERSION = 2
_HEADER = struct.Struct("<16sIIQ")
_HEADER_SUM = struct.Struct("<Q")
_RECORD = struct.Struct("<16s16sQIQQ")  # hash, parent, checksum of the bytes, size, sequence, tenant
_SUM = struct.Struct("<I")  # of the record and its slot's number
_SLOT = struct.Struct("<Q")
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
        return PAGE_BYTES

    @property
    def records_offset(self) -> int:
        """Where the record of slot 0 is."""
        return self.data_offset + self.slots_max * self.slot_bytes

    @property
    def file_bytes(self) -> int:
        """The whole file."""
        return self.records_offset + self.records_bytes

    @classmethod
    def within(cls, nbytes: int, slot_bytes: int) -> "Layout | None":
        """The largest layout whose file has at most ``nbytes``; None if that holds no slot."""
        slots = max(0, nbytes - PAGE_BYTES) // (slot_bytes + RECORD_BYTES)
        while slots > 0 and cls(slot_bytes, slots).file_bytes > nbytes:
            slots -= 1
        return cls(slot_bytes, slots) if slots > 0 else None

    def after(self, former: "Layout") -> "Layout | None":
        """The layout nearest to this one, and no larger, to which a file of ``former`` can be brought in place.

        Both record regions must be whole until the header says which is true, so they must not overlap: a small
        growth is none, a small shrinking is a larger one. None: the file must be made anew.
        """
        if self.slot_bytes != former.slot_bytes:
            return None
        if self.slots_max >= former.slots_max:
            enough = self.records_offset >= former.file_bytes
            return self if enough else former
        slots = self.slots_max
        while slots > 0 and Layout(self.slot_bytes, slots).file_bytes > former.records_offset:
            slots -= 1
        return Layout(self.slot_bytes, slots) if slots > 0 else None


def pack_header(layout: Layout) -> bytes:
    """The first page of a file."""
    head = _HEADER.pack(_MAGIC, _VERSION, layout.slot_bytes, layout.slots_max)
    return (head + _HEADER_SUM.pack(checksum(head))).ljust(PAGE_BYTES, b"\0")


def unpack_header(page: bytes) -> Layout | None:
    """What the first page says; None if it is no header of this version."""
    if len(page) < _HEADER.size + _HEADER_SUM.size:
        return None
    head = page[: _HEADER.size]
    magic, version, slot_bytes, slots = _HEADER.unpack(head)
    (found,) = _HEADER_SUM.unpack_from(page, _HEADER.size)
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
    body = _RECORD.pack(block.hash, block.parent, block.checksum, block.size_bytes, record.sequence, block.tenant)
    return body + _sum(body, record.slot)


def _sum(body: bytes, slot: int) -> bytes:
    return _SUM.pack(checksum(body + _SLOT.pack(slot)) & 0xFFFFFFFF)


def unpack_records(data: bytes, layout: Layout) -> Iterator[Record | int]:
    """Every record of the region that is not erased; where one is torn or makes no sense, the number of its slot."""
    for slot in range(layout.slots_max):
        raw = data[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES]
        if raw == ERASED:
            continue
        body = raw[: _RECORD.size]
        block_hash, parent, summed, size_bytes, sequence, tenant = _RECORD.unpack(body)
        whole = raw[_RECORD.size :] == _sum(body, slot)
        if not whole or not 0 < size_bytes <= layout.slot_bytes or block_hash == parent:
            yield slot
        else:
            block = TierBlock(BlockHash(block_hash), BlockHash(parent), size_bytes, Checksum(summed), TenantKey(tenant))
            yield Record(slot, sequence, block)


assert HASH_BYTES == 16, "a record has room for exactly this"
