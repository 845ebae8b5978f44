"""Packed bodies, in whatever pieces they come."""

import gzip
import random
import zlib

import pytest

from router.calls.errors import CallFailed
from router.http.inflate import PART_BYTES, inflation

DATA = random.Random(3).randbytes(50_000) + b"\0" * 3 * PART_BYTES + b"end"
PACKED = {"gzip": gzip.compress(DATA), "deflate": zlib.compress(DATA), "X-GZIP": gzip.compress(DATA)}


def unpacked(coding: str, data: bytes, piece: int) -> bytes:
    inflated = inflation(coding)
    assert inflated is not None
    told: list[bytes] = []
    for at in range(0, len(data), piece):
        for part in inflated.feed(data[at : at + piece]):
            assert len(part) <= PART_BYTES
            told.append(part)
    inflated.end()
    assert inflated.size == sum(map(len, told))
    return b"".join(told)


@pytest.mark.parametrize("coding", PACKED)
@pytest.mark.parametrize("piece", [1, 777, 1 << 20])
def test_what_was_packed_comes_out(coding: str, piece: int) -> None:
    assert unpacked(coding, PACKED[coding], piece) == DATA


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_files_one_after_another_are_one(piece: int) -> None:
    assert unpacked("gzip", gzip.compress(b"one ") + gzip.compress(b"") + gzip.compress(b"two"), piece) == b"one two"


@pytest.mark.parametrize("piece", [1, 1 << 20])
@pytest.mark.parametrize(
    ("coding", "data"),
    [
        ("gzip", PACKED["gzip"][:-1]),
        ("gzip", PACKED["gzip"] + b"more"),
        ("gzip", b"{}"),
        ("gzip", PACKED["gzip"][:30_000] + b"\0" + PACKED["gzip"][30_001:]),
        ("deflate", PACKED["deflate"] + b"more"),
        ("deflate", PACKED["deflate"][:-5]),
    ],
    ids=range(6),
)
def test_what_is_broken_is_said(coding: str, data: bytes, piece: int) -> None:
    with pytest.raises(CallFailed) as failed:
        unpacked(coding, data, piece)
    assert (failed.value.cause, failed.value.code) == ("invalid", "invalid_encoding")


def test_what_nobody_packs_or_unpacks() -> None:
    for none in ("", " ", "identity", "Identity, identity"):
        assert inflation(none) is None
    for other in ("br", "zstd", "gzip, gzip", "compress", "gzip, br"):
        with pytest.raises(CallFailed) as failed:
            inflation(other)
        assert failed.value.cause == "unsupported_media"
