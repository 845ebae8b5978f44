"""Products without instructions for bfloat16: weights become float32 in panels that stay in the nearest cache.

Each two rows have a *cell*: a vector of partial sums, which stays in registers for a run of their lengths and in memory
between two runs. In what runs, and how many rows at once, changes no bit: a cell's lanes are summed in the same order
on every processor, and folded in the same.
"""

# Code generators have the signatures that numba prescribes and work on values that it does not type.
# pyright: basic

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from tracehaul.engine.cpu.compiling import TILING, inner
from tracehaul.engine.cpu.phases import CELL_BYTES, FULL, LINE_BYTES, PANEL_BYTES, PANEL_OUTPUTS, PANEL_STEPS
from tracehaul.engine.cpu.products import ir_sum_each
from tracehaul.engine.cpu.vectors import (
    F32,
    FLOATS,
    I64,
    KIND_BYTES,
    LANES,
    expect,
    ir_expect,
    ir_fma,
    ir_load,
    ir_offset,
    ir_pointer,
    ir_wide_load,
    load,
    mul,
    size_of,
    store,
    vector,
    word,
)

_UNROLLED = 2
_AHEAD_BYTES = 16 << 10
"""How far before their use weights are asked for, at least: as long as memory takes, at a core's whole rate."""


def ir_cells(outputs, rows, expecting):
    """Generator of the cells of ``outputs`` rows of weights with ``rows`` others, over a run of their length."""

    def generate(context, builder, signature, arguments):
        w, w_stride, x, x_stride, length, cells, first, ahead, _ = arguments
        kind, lanes = signature.args[8], TILING.lanes
        piece = ir.VectorType(F32, lanes)
        parts = range(0, LANES, lanes)

        def places():
            for row in range(rows):
                for output in range(outputs):
                    offset = row * LANES * CELL_BYTES + output * CELL_BYTES
                    for part in parts:
                        yield (output, row, part), ir_offset(builder, cells, offset + part * 4)

        sums = {at: cgutils.alloca_once(builder, piece) for at, _ in places()}
        with builder.if_else(builder.icmp_signed("!=", first, ir.Constant(I64, 0))) as (fresh, further):
            with fresh:
                for cell in sums.values():
                    builder.store(ir.Constant(piece, None), cell)
            with further:
                for at, place in places():
                    builder.store(ir_load(builder, place, piece, 64), sums[at])

        def step(base, stride, rows, position):
            return [
                builder.add(builder.add(base, builder.mul(stride, ir.Constant(I64, row))), position)
                for row in range(rows)
            ]

        with cgutils.for_range(builder, builder.udiv(length, ir.Constant(I64, LANES * _UNROLLED))) as loop:
            left = step(w, w_stride, outputs, _times(builder, loop.index, KIND_BYTES[kind]))
            right = step(x, x_stride, rows, _times(builder, loop.index, 4))
            if expecting:
                for place in left:
                    for line in range(0, LANES * _UNROLLED * KIND_BYTES[kind], LINE_BYTES):
                        ir_expect(builder, ir_offset(builder, builder.add(place, ahead), line))
            for at in range(0, LANES * _UNROLLED, lanes):
                ws = [
                    ir_wide_load(builder, ir_offset(builder, place, at * KIND_BYTES[kind]), kind, lanes)
                    for place in left
                ]
                for row in range(rows):
                    value = ir_load(builder, ir_offset(builder, right[row], at * 4), piece, 4)
                    for output in range(outputs):
                        cell = sums[output, row, at % LANES]
                        builder.store(ir_fma(builder, ws[output], value, builder.load(cell)), cell)
        for at, place in places():
            builder.store(builder.load(sums[at]), ir_pointer(builder, place, piece), align=64)
        return context.get_dummy_value()

    return generate


def _times(builder, index, width):
    return builder.mul(index, ir.Constant(I64, LANES * _UNROLLED * width))


def _make_cells(outputs, rows, expecting):
    @word
    def cells(context, w, w_stride, x, x_stride, length, cells, first, ahead, kind):
        """``cells(w, w_stride, x, x_stride, length, cells, first, ahead, kind)``: anew if ``first``, else gone on with.

        ``w`` is of ``kind``, ``x`` float32; the length, in numbers, is a multiple of 32. Strides are in bytes. What
        lies ``ahead`` of the weights by that many bytes will be read soon, where they are ``expecting``.
        """
        return types.void(*[types.int64] * 8, kind), ir_cells(outputs, rows, expecting)

    return cells


_OUTPUTS, _ROWS = TILING.outputs, TILING.rows
_SINGLE_OUTPUTS = 4
stream_many, stream_single = _make_cells(_OUTPUTS, _ROWS, True), _make_cells(_SINGLE_OUTPUTS, 1, True)
panel_many, panel_single = _make_cells(_OUTPUTS, _ROWS, False), _make_cells(_SINGLE_OUTPUTS, 1, False)


@word
def fold(context, cells):
    """``fold(cells) -> vector``: the sums of 16 cells."""

    def generate(context, builder, signature, arguments):
        places = [ir_offset(builder, arguments[0], at * CELL_BYTES) for at in range(LANES)]
        return ir_sum_each(builder, [ir_load(builder, place, FLOATS, 64) for place in places])

    return vector(types.int64), generate


@inner
def unpack_panel(source: int, source_stride: int, outputs: int, length: int, target: int, kind: Any) -> None:
    """A run of some rows of weights, one after the other, as float32; what follows in each is expected meanwhile."""
    for output in range(outputs):
        row, out = source + output * source_stride, target + output * length * 4
        for at in range(0, length, 2 * LANES):
            place = row + at * size_of(kind)
            expect(place + outputs * source_stride)
            store(out + at * 4, load(place, kind), FULL)
            store(out + (at + LANES) * 4, load(place + LANES * size_of(kind), kind), FULL)


@inner
def stream(w: int, w_stride: int, x: int, x_stride: int, rows: int, length: int, cells: int, kind: Any) -> None:
    """Cells of 16 outputs with few rows: weights are read once, and widened in registers."""
    group = _OUTPUTS if rows == _ROWS else _SINGLE_OUTPUTS
    # Whole groups, so that each line is asked for once. What lies past the last is not touched, only expected.
    ahead = (_AHEAD_BYTES + group * w_stride - 1) // (group * w_stride) * group * w_stride
    for output in range(0, LANES, group):
        part, source = cells + output * CELL_BYTES, w + output * w_stride
        if rows == _ROWS:
            stream_many(source, w_stride, x, x_stride, length, part, 1, ahead, kind)
            continue
        for row in range(rows):
            own = part + row * LANES * CELL_BYTES
            stream_single(source, w_stride, x + row * x_stride, x_stride, length, own, 1, ahead, kind)


@inner
def multiply_panel(w: int, outputs: int, x: int, x_stride: int, rows: int, length: int, cells: int, first: int) -> None:
    """Cells of a panel's outputs with all rows, over a run of their length."""
    stride, many = length * 4, rows // _ROWS * _ROWS
    for row in range(0, many, _ROWS):
        for output in range(0, outputs, _OUTPUTS):
            place = cells + (row * LANES + output) * CELL_BYTES
            panel_many(w + output * stride, stride, x + row * x_stride, x_stride, length, place, first, 0, FULL)
    for row in range(many, rows):
        for output in range(0, outputs, _SINGLE_OUTPUTS):
            place = cells + (row * LANES + output) * CELL_BYTES
            panel_single(w + output * stride, stride, x + row * x_stride, x_stride, length, place, first, 0, FULL)


@inner
def panelled(
    w: int, scales: int, x: int, x_stride: int, rows: int, outputs: int, length: int,
    out: int, out_stride: int, panel: int, like: Any, kind: Any,
) -> None:  # fmt: skip
    """``out[row, n] = x[row] . w[n]``, float32, of float32 rows; at least 16 outputs."""
    w_stride, cells = length * size_of(kind), panel + PANEL_BYTES
    if rows <= _ROWS:
        # Another thread has asked for the first of them, or nobody.
        for at in range(0, min(outputs * w_stride, _AHEAD_BYTES), LINE_BYTES):
            expect(w + at)
    for start in range(0, outputs, LANES):
        # The last run of a number that 16 does not divide begins earlier, and computes some again.
        n = min(start, outputs - LANES)
        if rows <= _ROWS:
            stream(w + n * w_stride, w_stride, x, x_stride, rows, length, cells, kind)
        else:
            for at in range(0, length, PANEL_STEPS):
                steps, first = min(PANEL_STEPS, length - at), 1 if at == 0 else 0
                for output in range(0, LANES, PANEL_OUTPUTS):
                    source = w + (n + output) * w_stride + at * size_of(kind)
                    unpack_panel(source, w_stride, PANEL_OUTPUTS, steps, panel, kind)
                    place = cells + output * CELL_BYTES
                    multiply_panel(panel, PANEL_OUTPUTS, x + at * 4, x_stride, rows, steps, place, first)
        for row in range(rows):
            sums = fold(cells + row * LANES * CELL_BYTES)
            if size_of(kind) == 1:
                sums = mul(sums, load(scales + n * 4, FULL))
            store(out + row * out_stride + n * 4, sums, FULL)
