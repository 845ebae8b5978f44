"""Products of activations with weights, in the way that suits the processor."""

# numba types these functions, from their arguments.
# pyright: basic

from typing import Any

from tracehaul.engine.cpu.compiling import TILING, inner
from tracehaul.engine.cpu.panels import panelled
from tracehaul.engine.cpu.phases import FULL, LINE_BYTES
from tracehaul.engine.cpu.products import (
    dot_4x4,
    dot_8x2,
    dot_16x1,
    store_2x8,
    store_4x4,
    widen,
)
from tracehaul.engine.cpu.vectors import (
    LANES,
    expect,
    load,
    mul,
    size_of,
    store,
)


@inner
def unpack_run(source: int, count: int, target: int, like: Any) -> None:
    """A run of int8 weights into the panel; the next run is expected meanwhile."""
    for at in range(0, count, 2 * LANES):
        expect(source + count + at)
        widen(source + at, target + at * size_of(like), like)


@inner
def scale_run(column: int, stride: int, rows: int, scales: int) -> None:
    """A run of sums, each by its weights' scale."""
    factors = load(scales, FULL)
    for row in range(rows):
        store(column + row * stride, mul(load(column + row * stride, FULL), factors), FULL)


@inner
def straight(
    w: int, scales: int, x: int, x_stride: int, rows: int, outputs: int, length: int,
    out: int, out_stride: int, panel: int, like: Any, kind: Any,
) -> None:  # fmt: skip
    """``out[row, n] = x[row] . w[n]``, float32; at least 16 outputs."""
    w_stride = length * size_of(like)
    for start in range(0, outputs, LANES):
        # The last run of a number that 16 does not divide begins earlier, and computes some again.
        n = min(start, outputs - LANES)
        run, column = w + n * length * size_of(kind), out + n * 4
        if size_of(kind) == 1:
            unpack_run(run, LANES * length, panel, like)
            run = panel
        paired = rows // 4 * 4
        # Rows inside: four rows of weights stay in the nearest cache while all rows are multiplied by them.
        for part in range(0, LANES, 4):
            w_part, cell = run + part * w_stride, column + part * 4
            if 0 < paired <= LANES and size_of(kind) > 1:
                # The next four come while these are computed; what lies past the last is not touched, only expected.
                # More rows find theirs in a cache: another block of rows was there before.
                for at in range(4 * w_stride, 8 * w_stride, LINE_BYTES):
                    expect(w_part + at)
            for row in range(0, paired, 4):
                sums = dot_4x4(w_part, w_stride, x + row * x_stride, x_stride, length, like)
                store_4x4(cell + row * out_stride, out_stride, sums)
        if rows - paired >= 2:
            x_row, cell = x + paired * x_stride, column + paired * out_stride
            for part in range(0, LANES, 8):
                sums = dot_8x2(run + part * w_stride, w_stride, x_row, x_stride, length, like)
                store_2x8(cell + part * 4, out_stride, sums)
            paired += 2
        if paired < rows:
            sums = dot_16x1(run, w_stride, x + paired * x_stride, x_stride, length, like)
            store(column + paired * out_stride, sums, FULL)
        if size_of(kind) == 1:
            scale_run(column, out_stride, rows, scales + n * 4)


product = straight if TILING.pairs else panelled
