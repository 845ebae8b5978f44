"""Names of objects, what a listing makes of them, and when a service is left alone."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.index.tenants import TenantKey
from kvstore.tiers.base import TierBlock
from kvstore.tiers.breaker import Breaker
from kvstore.tiers.objects import ListedObject, Listing, pack_name, parse_url, unpack_name
from tracehaul.wire.ids import BlockHash, Checksum

SLOT = 4096

hashes = st.binary(min_size=16, max_size=16).map(BlockHash)
blocks = st.builds(
    TierBlock,
    hashes,
    hashes,
    st.integers(1, 2**32 - 1).filter(lambda n: n < 10**10),
    st.integers(0, 2**64 - 1).map(Checksum),
    st.integers(0, 2**64 - 1).map(TenantKey),
).filter(lambda block: block.hash != block.parent)


def block(number: int, size_bytes: int = 100) -> TierBlock:
    return TierBlock(BlockHash(number.to_bytes(16)), BlockHash(b"\xff" * 16), size_bytes, Checksum(number))


def listed(number: int, sequence: int, size_bytes: int = 100) -> ListedObject:
    return ListedObject(pack_name(block(number), sequence), size_bytes)


@given(blocks, st.integers(0, 10**18 - 1))
def test_a_name_says_all_of_its_block(block: TierBlock, sequence: int) -> None:
    assert unpack_name(pack_name(block, sequence)) == (block, sequence)


@pytest.mark.parametrize(
    "name", ["", "notes.txt", "a/b", pack_name(block(1), 2) + ".tmp", pack_name(block(1), 2).upper() + "X", "..", "~"]
)
def test_names_of_others_are_not_ours(name: str) -> None:
    assert unpack_name(name) is None
    listing = Listing()
    listing.add([ListedObject(name, 100)], SLOT)
    assert (listing.foreign, listing.useless, listing.restore(10)) == (1, [], ([], []))


def test_of_two_objects_of_a_block_the_newer_is_kept() -> None:
    for order in (1, -1):
        listing = Listing()
        listing.add([listed(7, 3), listed(7, 9), listed(8, 4)][::order], SLOT)
        records, names = listing.restore(10)
        assert [(record.block.hash[-1], record.sequence) for record in records] == [(7, 9), (8, 4)]
        assert names == [pack_name(block(7), 9), pack_name(block(8), 4)]
        assert listing.useless == [pack_name(block(7), 3)]


def test_what_is_cut_short_or_too_large_is_of_no_use() -> None:
    listing = Listing()
    large = pack_name(block(3, SLOT + 1), 1)
    listing.add([listed(1, 1, size_bytes=99), ListedObject(large, SLOT + 1), listed(2, 1)], SLOT)
    records, _ = listing.restore(10)
    assert [record.block.hash[-1] for record in records] == [2]
    assert listing.useless == [pack_name(block(1), 1), large]


def test_a_smaller_budget_keeps_the_newest() -> None:
    listing = Listing()
    order = list(range(20))
    random.Random(1).shuffle(order)
    listing.add([listed(n, n) for n in order], SLOT)
    records, names = listing.restore(5)
    assert sorted(record.sequence for record in records) == [15, 16, 17, 18, 19]
    assert [record.slot for record in records] == list(range(5))
    assert len(listing.useless) == 15
    assert not set(names) & set(listing.useless)


@pytest.mark.parametrize(
    ("url", "parts"),
    [("s3://bucket", ("bucket", "")), ("s3://b.c-d/", ("b.c-d", "")), ("s3://bucket/a/b/", ("bucket", "a/b"))],
)
def test_addresses(url: str, parts: tuple[str, str]) -> None:
    assert parse_url(url) == parts


@pytest.mark.parametrize("url", ["", "bucket", "s3:/bucket", "s3://", "s3://B/x", "https://bucket", "s3://bucket//x"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="not an address"):
        parse_url(url)


def test_a_breaker_opens_after_failures_in_a_row_and_waits_longer_each_time() -> None:
    breaker = Breaker(3, 1.0, 5.0)
    assert [breaker.failed(), breaker.failed()] == [False, False]
    breaker.answered()
    assert [breaker.failed(), breaker.failed(), breaker.failed(), breaker.failed()] == [False, False, True, False]
    assert (breaker.open, breaker.pause_s) == (True, 1.0)
    breaker.answered()  # what was under way
    assert breaker.open
    for pause_s in (2.0, 4.0, 5.0, 5.0):
        breaker.still_failing()
        assert breaker.pause_s == pause_s
    breaker.close()
    assert not breaker.open
    breaker.failed(final=True)
    assert (breaker.open, breaker.pause_s) == (True, 5.0), "one that only answers probes is not asked ever faster"
    breaker.close()
    breaker.answered()
    breaker.failed(final=True)
    assert breaker.pause_s == 1.0
