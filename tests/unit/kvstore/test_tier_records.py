"""The slot file's format: what is packed comes back, and nothing else does."""

import random

from hypothesis import given
from hypothesis import strategies as st

from kvstore.index.tenants import tenant_key
from kvstore.tiers.base import TierBlock
from kvstore.tiers.records import (
    ERASED,
    RECORD_BYTES,
    Layout,
    Record,
    pack_header,
    pack_record,
    unpack_header,
    unpack_records,
)
from tracehaul.wire.ids import BlockHash, Checksum

LAYOUT = Layout(8192, 8)


def block(number: int, size: int = 5000) -> TierBlock:
    return TierBlock(BlockHash(number.to_bytes(16)), BlockHash(b"\xff" * 16), size, Checksum(number * 7919))


def region(records: dict[int, bytes]) -> bytes:
    return b"".join(records.get(slot, ERASED) for slot in range(LAYOUT.slots_max))


def test_records_come_back_from_their_slots() -> None:
    records = [Record(slot, 100 - slot, block(slot + 1)) for slot in (0, 3, 7)]
    data = region({record.slot: pack_record(record) for record in records})
    assert list(unpack_records(data, LAYOUT)) == records


@given(st.integers(0, RECORD_BYTES * 8 - 1))
def test_every_flipped_bit_is_seen(bit: int) -> None:
    packed = bytearray(pack_record(Record(2, 9, block(5))))
    packed[bit // 8] ^= 1 << bit % 8
    assert list(unpack_records(region({2: bytes(packed)}), LAYOUT)) == [2]


@given(st.integers(1, RECORD_BYTES - 1))
def test_a_record_torn_anywhere_is_seen(at: int) -> None:
    old, new = pack_record(Record(2, 9, block(5))), pack_record(Record(2, 12, block(6)))
    for torn in (new[:at] + old[at:], new[:at] + ERASED[at:], ERASED[:at] + new[at:]):
        found = list(unpack_records(region({2: torn}), LAYOUT))
        whole = [record for record in found if isinstance(record, Record)]
        assert [pack_record(record) for record in whole] in ([], [torn])
        assert whole or found == ([] if torn == ERASED else [2])


def test_a_record_is_good_for_its_own_slot_only() -> None:
    packed = pack_record(Record(2, 9, block(5)))
    assert list(unpack_records(region({4: packed}), LAYOUT)) == [4]


def test_a_record_that_makes_no_sense_is_refused() -> None:
    too_large = pack_record(Record(0, 1, block(5, size=LAYOUT.slot_bytes + 1)))
    empty = pack_record(Record(1, 1, block(6, size=0)))
    assert list(unpack_records(region({0: too_large, 1: empty}), LAYOUT)) == [0, 1]


def test_headers() -> None:
    page = pack_header(LAYOUT)
    assert len(page) == 4096
    assert unpack_header(page) == LAYOUT
    for at in random.Random(0).sample(range(40), 40):
        broken = bytearray(page)
        broken[at] ^= 0x10
        assert unpack_header(bytes(broken)) is None
    assert unpack_header(b"") is None
    assert unpack_header(bytes(4096)) is None


@given(st.integers(0, 1 << 30), st.sampled_from([4096, 65536, 262144]))
def test_a_layout_never_exceeds_its_bytes_and_wastes_less_than_two_slots(nbytes: int, slot_bytes: int) -> None:
    layout = Layout.within(nbytes, slot_bytes)
    if layout is None:
        assert nbytes < slot_bytes + 3 * 4096
        return
    assert layout.file_bytes <= nbytes
    assert nbytes - layout.file_bytes < 2 * slot_bytes + 2 * 4096
    assert layout.data_offset % 4096 == layout.records_offset % 4096 == 0


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([4096, 65536]))
def test_a_resized_file_never_overwrites_what_is_true_before_its_header_says_so(
    before: int, wanted: int, slot_bytes: int
) -> None:
    former, asked = Layout(slot_bytes, before), Layout(slot_bytes, wanted)
    layout = asked.after(former)
    assert asked.after(Layout(2 * slot_bytes, before)) is None
    if layout is None:
        assert before <= 2 or wanted <= 2, "there was room for something"
        return
    if layout == former:
        assert 0 <= wanted - before <= before * RECORD_BYTES / slot_bytes + 1
        return
    regions = sorted([(former.records_offset, former.file_bytes), (layout.records_offset, layout.file_bytes)])
    assert regions[0][1] <= regions[1][0]
    assert layout.file_bytes <= asked.file_bytes
    assert layout.slots_max > before or layout.slots_max >= wanted - before * RECORD_BYTES / slot_bytes - 1


def test_a_tenant_is_kept_with_its_block() -> None:
    record = Record(2, 9, block(5)._replace(tenant=tenant_key("acme")))
    assert list(unpack_records(region({2: pack_record(record)}), LAYOUT)) == [record]
