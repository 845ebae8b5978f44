"""The compiled copy against numpy's copying and xxhash's sums."""

import itertools
import random

import numpy as np
import pytest

from tracehaul.transfer.copying import BLOCK_BYTES, ROW, SUMMED_BYTES_MIN, compiled, rows_of
from tracehaul.wire.hashing import checksum

SIZES = [241, 255, 256, 320, 1023, 1024, 1025, 1088, 2047, 2048, 2049, 65536, 65537, 200_001]
SOURCE = np.frombuffer(random.Random(1).randbytes(1 << 19), dtype=np.uint8)


@pytest.mark.parametrize("bytes_max", [BLOCK_BYTES, 3000, 1 << 20])
@pytest.mark.parametrize("past_caches", [False, True])
def test_bytes_and_sums_are_those_of_the_source(bytes_max: int, past_caches: bool) -> None:
    advance, dice = compiled(), random.Random(bytes_max)
    for shift in (0, 1, 64, 77):  # of the target: stores past the caches are aligned ones
        sizes = dice.sample(SIZES, len(SIZES))
        starts = [dice.randrange(SOURCE.nbytes - size) for size in sizes]
        gaps = [dice.choice([0, 1, 64, 100]) for _ in sizes]
        places = np.cumsum([shift, *[size + gap for size, gap in zip(sizes, gaps, strict=True)]]).tolist()
        target = np.full(places.pop() + 64, 7, dtype=np.uint8)
        expected = target.copy()
        for start, place, size in zip(starts, places, sizes, strict=True):
            expected[place : place + size] = SOURCE[start : start + size]

        rows = rows_of(_column(starts) + SOURCE.ctypes.data, _column(places) + target.ctypes.data, _column(sizes))
        done = calls = 0
        while done < len(rows):
            now = advance(rows.ctypes.data + done * ROW.itemsize, len(rows) - done, bytes_max, past_caches)
            assert not rows["left"][: done + now].any()
            done, calls = done + now, calls + 1
        assert calls >= sum(sizes) // (bytes_max + BLOCK_BYTES)
        assert (target == expected).all()
        assert rows["sums"][:, 0].tolist() == [
            checksum(SOURCE[start : start + size].data) for start, size in zip(starts, sizes, strict=True)
        ]


@pytest.mark.parametrize("bytes_max", [BLOCK_BYTES, 3000, 1 << 20])
@pytest.mark.parametrize("last", [SUMMED_BYTES_MIN, 1000, 1024, 1025, 5000])
def test_pieces_are_summed_as_one(bytes_max: int, last: int) -> None:
    sizes = [1024, 3072, 1024, last, 700, 2048, last]
    wholes = [sum(sizes[:4]), 700, 2048 + last]
    starts = [random.Random(bytes_max + at).randrange(SOURCE.nbytes - size) for at, size in enumerate(sizes)]
    target = np.zeros(sum(sizes), dtype=np.uint8)
    places = (np.cumsum(sizes) - sizes).tolist()
    rows = rows_of(_column(starts) + SOURCE.ctypes.data, _column(places) + target.ctypes.data, _column(sizes))
    rows["nbytes"] = [0, 0, 0, wholes[0], wholes[1], 0, wholes[2]]
    done = 0
    while done < len(rows):
        done += compiled()(rows.ctypes.data + done * ROW.itemsize, len(rows) - done, bytes_max, False)
    assert target.tobytes() == b"".join(
        SOURCE[at : at + size].tobytes() for at, size in zip(starts, sizes, strict=True)
    )
    cuts = np.cumsum([0, *wholes]).tolist()
    expected = [checksum(target[start:end].data) for start, end in itertools.pairwise(cuts)]
    assert rows["sums"][[3, 4, 6], 0].tolist() == expected


def test_a_call_copies_no_more_than_it_may() -> None:
    target = np.zeros(1 << 18, dtype=np.uint8)
    rows = rows_of(_column([SOURCE.ctypes.data]), _column([target.ctypes.data]), _column([target.nbytes]))
    assert compiled()(rows.ctypes.data, 1, 10 * BLOCK_BYTES, True) == 0
    assert rows["left"][0] == target.nbytes - 10 * BLOCK_BYTES
    assert (target[: 10 * BLOCK_BYTES] == SOURCE[: 10 * BLOCK_BYTES]).all()
    assert not target[10 * BLOCK_BYTES :].any()


def test_any_bit_of_any_place_changes_the_sum() -> None:
    source, target = SOURCE[:3001].copy(), np.zeros(3001, dtype=np.uint8)
    sums: set[int] = set()
    for at in range(0, 3001, 5):
        source[at] ^= 1 << at % 8
        rows = rows_of(_column([source.ctypes.data]), _column([target.ctypes.data]), _column([source.nbytes]))
        compiled()(rows.ctypes.data, 1, 1 << 20, False)
        sums.add(int(rows["sums"][0, 0]))
    assert len(sums) == 601


def test_the_shortest_row_is_the_longest_that_xxhash_sums_otherwise_and_one() -> None:
    # What is one byte shorter does not have this sum: the limit is where it must be, not only on the safe side.
    for nbytes, equal in ((SUMMED_BYTES_MIN, True), (SUMMED_BYTES_MIN - 1, False)):
        target = np.zeros(nbytes, dtype=np.uint8)
        rows = rows_of(_column([SOURCE.ctypes.data]), _column([target.ctypes.data]), _column([nbytes]))
        compiled()(rows.ctypes.data, 1, 1 << 20, False)
        assert (target == SOURCE[:nbytes]).all()
        assert (int(rows["sums"][0, 0]) == checksum(target.data)) is equal


def _column(values: list[int]) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    return np.array(values, dtype=np.uint64)
