"""What UCXX agents tell each other: it survives the wire, and damage is seen before UCX sees it."""

import msgspec
import numpy as np
import pytest

from tracehaul.transfer import ucxx_words as words
from tracehaul.transfer.ucxx_words import Landed, Noted, Refused, Write
from tracehaul.wire.errors import TransferError

ADDRESS = bytes(range(81))


@pytest.mark.parametrize(
    "message", [Noted(b"n"), Write(1, words.DATA | 5, b"x" * 16, b""), Landed(7), Refused(7, "no")]
)
def test_an_envelope_survives_the_wire(message: words.Words) -> None:
    envelope = words.unpack(words.pack("a#1", ADDRESS, message))
    assert (envelope.name, envelope.address, envelope.words) == ("a#1", ADDRESS, message)


def test_a_damaged_address_is_never_believed() -> None:
    packed = words.pack("a#1", ADDRESS, Landed(7))
    for at in range(len(packed)):
        damaged = packed[:at] + bytes([packed[at] ^ 0x10]) + packed[at + 1 :]
        try:
            assert words.unpack(damaged).address == ADDRESS
        except TransferError:
            continue


@pytest.mark.parametrize("address", [b"", b"x" * (words.ADDRESS_BYTES_MAX + 1)])
def test_an_impossible_address_is_refused(address: bytes) -> None:
    with pytest.raises(TransferError):
        words.unpack(words.pack("a#1", address, Landed(7)))
    with pytest.raises(TransferError):
        words.unpack_peer(words.pack_peer("a#1", address))


@pytest.mark.parametrize("data", [b"", b"garbage", msgspec.msgpack.encode({"name": "a"})])
def test_garbage_is_no_envelope_and_no_metadata(data: bytes) -> None:
    for unpack in (words.unpack, words.unpack_peer):
        with pytest.raises(TransferError):
            unpack(data)


def test_rows_survive_the_wire_and_impossible_ones_are_refused() -> None:
    rows = np.array([[1 << 40, 7, 0], [5, 1 << 33, 0]], dtype=np.uint64)
    assert words.unpack_rows(words.pack_rows(rows)) == [(1 << 40, 7), (5, 1 << 33)]
    for bad in (b"", b"x" * 15, b"\0" * 16, b"x" * 16 * (words.ROWS_MAX + 1)):
        with pytest.raises(TransferError):
            words.unpack_rows(bad)


def test_both_sides_cut_rows_alike() -> None:
    sizes = [1, words.PIECE_BYTES, words.PIECE_BYTES + 1, 3 * words.PIECE_BYTES]
    rows = [np.zeros(size, dtype=np.uint8) for size in sizes]
    cut = [piece.nbytes for piece in words.cut(rows)]
    assert len(cut) == words.pieces_in(np.array(sizes, dtype=np.uint64)) == 7
    assert sum(cut) == sum(sizes)
    assert max(cut) <= words.PIECE_BYTES
