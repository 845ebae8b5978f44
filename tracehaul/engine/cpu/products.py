"""Products of matrices in registers, and the orders of memory that they want: more words for compiled functions.

As in :mod:`tracehaul.engine.cpu.vectors`, whose generators these build on.
"""

# Code generators have the signatures that numba prescribes and work on values that it does not type.
# pyright: basic

from llvmlite import ir
from numba import types
from numba.core import cgutils

from tracehaul.engine.cpu.compiling import TILING
from tracehaul.engine.cpu.vectors import (
    BFLOATS,
    F32,
    FLOATS,
    I16,
    I32,
    I64,
    KIND_BYTES,
    LANES,
    ir_call,
    ir_constant,
    ir_fma,
    ir_load,
    ir_offset,
    ir_operand,
    ir_pointer,
    ir_shuffle,
    ir_splat,
    ir_wide_load,
    vector,
    word,
)


def ir_sum_each(builder, vectors):
    """One vector of the sums of 16 vectors, by a tree that folds two vectors into one at each step.

    At each step lanes are viewed as runs of ``width``: the lower halves of both are added to the upper halves.
    """
    width = LANES
    while len(vectors) > 1:
        half = width // 2
        folded = []
        # Pairs that are far apart, so that the last step leaves the sums in order.
        for a, b in zip(vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :], strict=True):
            low, high = [], []
            for run in range(0, LANES, width):
                low += [run + lane for lane in range(half)] + [LANES + run + lane for lane in range(half)]
                high += [run + half + lane for lane in range(half)] + [
                    LANES + run + half + lane for lane in range(half)
                ]
            folded.append(builder.fadd(ir_shuffle(builder, a, b, low), ir_shuffle(builder, a, b, high)))
        vectors, width = folded, half
    return vectors[0]


def _dot_step(builder, like, w, x, accumulator):
    """Add the products of two loaded pieces; lanes hold partial sums. bfloat16 comes in pairs."""
    if like == types.uint16:
        return ir_call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [accumulator, w, x])
    return ir_fma(builder, w, x, accumulator)


def _dots(outputs, rows):
    """Generator of the products of ``outputs`` rows of a matrix and ``rows`` of another: 16 of them."""

    def generate(context, builder, signature, arguments):
        w, w_stride, x, x_stride, length, _ = arguments
        like = signature.args[5]
        step_bytes = 64
        piece = BFLOATS if like == types.uint16 else FLOATS
        elements = step_bytes // KIND_BYTES[like]

        def fetch(base, stride, at, position):
            address = builder.add(builder.add(base, position), builder.mul(stride, ir.Constant(I64, at)))
            return ir_load(builder, address, piece, 2)

        sums = [cgutils.alloca_once_value(builder, ir_constant(0.0)) for _ in range(LANES)]
        for cell in sums:
            builder.store(ir_constant(0.0), cell)
        with cgutils.for_range(builder, builder.udiv(length, ir.Constant(I64, elements))) as loop:
            position = builder.mul(loop.index, ir.Constant(I64, step_bytes))
            left = [fetch(w, w_stride, at, position) for at in range(outputs)]
            for row in range(rows):
                right = fetch(x, x_stride, row, position)
                for at in range(outputs):
                    cell = sums[row * outputs + at]
                    builder.store(_dot_step(builder, like, left[at], right, builder.load(cell)), cell)
        return ir_sum_each(builder, [builder.load(cell) for cell in sums])

    return generate


def _dot_signature(like):
    integer = types.int64
    return vector(integer, integer, integer, integer, integer, like)


@word
def dot_16x1(context, w, w_stride, x, x_stride, length, like):
    """``dot_16x1(w, w_stride, x, x_stride, length, like) -> vector``: 16 rows at ``w`` times the row at ``x``.

    Strides are in bytes, the length in elements: a multiple of 64 bytes.
    """
    return _dot_signature(like), _dots(16, 1)


@word
def dot_8x2(context, w, w_stride, x, x_stride, length, like):
    """As :func:`dot_16x1`: 8 rows at ``w`` times 2 at ``x``, those of the first before those of the second."""
    return _dot_signature(like), _dots(8, 2)


@word
def dot_4x4(context, w, w_stride, x, x_stride, length, like):
    """As :func:`dot_16x1`: 4 rows at ``w`` times 4 at ``x``."""
    return _dot_signature(like), _dots(4, 4)


@word
def store_4x4(context, address, stride, value):
    """``store_4x4(address, stride, vector)``: what :func:`dot_4x4` gave, as 4 rows of 4 float32."""
    return types.void(types.int64, types.int64, vector), _store_rows(4)


@word
def store_2x8(context, address, stride, value):
    """``store_2x8(address, stride, vector)``: what :func:`dot_8x2` gave, as 2 rows of 8 float32."""
    return types.void(types.int64, types.int64, vector), _store_rows(2)


def _store_rows(rows):
    width = LANES // rows

    def generate(context, builder, signature, arguments):
        address, stride, value = arguments
        for row in range(rows):
            lanes = ir.Constant(ir.VectorType(I32, width), [row * width + lane for lane in range(width)])
            piece = builder.shuffle_vector(value, value, lanes)
            at = builder.add(address, builder.mul(stride, ir.Constant(I64, row)))
            builder.store(piece, ir_pointer(builder, at, piece.type), align=4)
        return context.get_dummy_value()

    return generate


_CELL_BYTES = 4
"""A pair of bfloat16, or one float32: what one lane multiplies in a step."""


def ir_tiles(rows, columns, fresh):
    """Generator of ``rows`` times ``16 * columns`` sums, added to what is at ``out`` unless ``fresh``."""

    def generate(context, builder, signature, arguments):
        a, a_stride, b, b_stride, steps, out, out_stride, _ = arguments
        like, lanes = signature.args[7], TILING.lanes
        piece = ir.VectorType(F32, lanes)
        numbers = BFLOATS if like == types.uint16 else piece
        parts = columns * LANES // lanes
        places = [(row, part) for row in range(rows) for part in range(parts)]
        # The fewer of the two stay in registers, while the others come one by one.
        places.sort(key=lambda place: place if parts <= rows else place[::-1])

        def at(base, stride, row, part):
            row_base = builder.add(base, builder.mul(stride, ir.Constant(I64, row)))
            return ir_offset(builder, row_base, part * lanes * 4)

        cells = {}
        for place in places:
            first = ir.Constant(piece, None) if fresh else ir_load(builder, at(out, out_stride, *place), piece, 4)
            cells[place] = cgutils.alloca_once(builder, piece)
            builder.store(first, cells[place])
        with cgutils.for_range(builder, steps) as loop:
            b_row = builder.add(b, builder.mul(loop.index, b_stride))
            a_column = builder.add(a, builder.mul(loop.index, ir.Constant(I64, _CELL_BYTES)))
            left, right = {}, {}
            for row, part in places:
                if row not in left:
                    number = ir_load(builder, at(a_column, a_stride, row, 0), F32, 2)
                    left[row] = builder.bitcast(ir_splat(builder, number, lanes), numbers)
                if part not in right:
                    value = ir_load(builder, ir_offset(builder, b_row, part * lanes * 4), piece, 4)
                    right[part] = builder.bitcast(value, numbers)
                cell = cells[row, part]
                builder.store(_dot_step(builder, like, left[row], right[part], builder.load(cell)), cell)
        for place, cell in cells.items():
            builder.store(builder.load(cell), ir_pointer(builder, at(out, out_stride, *place), piece), align=4)
        return context.get_dummy_value()

    return generate


def _tile_signature(like):
    return types.void(*[types.int64] * 7, like)


def _make_tile(rows, columns, fresh):
    @word
    def tile(context, a, a_stride, b, b_stride, steps, out, out_stride, like):
        """``tile(a, a_stride, b, b_stride, steps, out, out_stride, like)``: a product by cells of 4 bytes.

        ``a`` has rows of ``steps`` cells, ``b`` has ``steps`` rows of cells, one for each column; ``out`` is float32.
        Strides are in bytes.
        """
        return _tile_signature(like), ir_tiles(rows, columns, fresh)

    return tile


# The fewer rows, the more columns there are registers for.
COLUMNS_6, COLUMNS_3, COLUMNS_1 = (min(4, TILING.columns * times) * LANES for times in (1, 2, 4))
_TILES = ((6, COLUMNS_6 // LANES), (3, COLUMNS_3 // LANES), (1, COLUMNS_1 // LANES))
scores_6, scores_3, scores_1 = (_make_tile(rows, columns, fresh=True) for rows, columns in _TILES)
"""Fresh sums in so many columns, for that many rows."""
gather_6, gather_3, gather_1 = (_make_tile(rows, columns, fresh=False) for rows, columns in _TILES)
"""Adding to what is there, in as many columns."""
gather_narrow_1 = _make_tile(1, 2, fresh=False)
"""Adding to what is there, for one row in 32 columns."""


def _transposed(builder, rows):
    """Of as many vectors as each has lanes: each step exchanges the off-diagonal quarters of all squares."""
    lanes, size = len(rows), 1
    while size < lanes:
        for row in range(lanes):
            if row & size:
                continue
            upper, lower = rows[row], rows[row + size]
            kept = [lane if not lane & size else lanes + lane - size for lane in range(lanes)]
            moved = [lane + size if not lane & size else lanes + lane for lane in range(lanes)]
            rows[row], rows[row + size] = (
                builder.shuffle_vector(upper, lower, ir.Constant(ir.VectorType(I32, lanes), order))
                for order in (kept, moved)
            )
        size *= 2
    return rows


@word
def transpose(context, source, source_stride, target, target_stride, like):
    """``transpose(source, source_stride, target, target_stride, like)`` of 16 by 16 cells of 4 bytes.

    A cell is what products read: a pair of bfloat16, or a number as float32.
    """

    def generate(context, builder, signature, arguments):
        source, source_stride, target, target_stride, _ = arguments
        like, lanes = signature.args[4], TILING.lanes
        cell_bytes = _CELL_BYTES if ir_operand(like) == like else KIND_BYTES[like]
        kind = ir.VectorType(F32, lanes)

        def at(base, stride, row, offset):
            return ir_offset(builder, builder.add(base, builder.mul(stride, ir.Constant(I64, row))), offset)

        # Squares that a processor's registers hold.
        for first in range(0, LANES, lanes):
            for column in range(0, LANES, lanes):
                places = [at(source, source_stride, first + row, column * cell_bytes) for row in range(lanes)]
                if cell_bytes == _CELL_BYTES:
                    rows = [ir_load(builder, place, kind, 2) for place in places]
                else:
                    rows = [ir_wide_load(builder, place, like, lanes) for place in places]
                for row, value in enumerate(_transposed(builder, rows)):
                    place = at(target, target_stride, column + row, first * _CELL_BYTES)
                    builder.store(value, ir_pointer(builder, place, kind), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, like), generate


@word
def interleave(context, first, second, target):
    """``interleave(first, second, target)``: 32 pairs, one half from each of two runs of 32 16-bit numbers."""

    def generate(context, builder, signature, arguments):
        run = ir.VectorType(I16, 2 * LANES)
        a, b = (ir_load(builder, address, run, 2) for address in arguments[:2])
        for half in (0, 1):
            lanes = [at for lane in range(LANES) for at in (half * LANES + lane, 2 * LANES + half * LANES + lane)]
            pairs = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, 2 * LANES), lanes))
            builder.store(pairs, ir_pointer(builder, ir_offset(builder, arguments[2], half * 64), run), align=2)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@word
def widen(context, source, target, like):
    """``widen(source, target, like)``: 32 int8 as what ``like`` says, exactly."""

    def generate(context, builder, signature, arguments):
        source, target, _ = arguments
        numbers = ir_wide_load(builder, source, types.int8, 2 * LANES)
        if signature.args[2] == types.uint16:  # seven bits and a sign: bfloat16 has room for them
            bits = builder.bitcast(numbers, ir.VectorType(I32, 2 * LANES))
            upper = builder.lshr(bits, ir.Constant(bits.type, [16] * (2 * LANES)))
            numbers = builder.trunc(upper, ir.VectorType(I16, 2 * LANES))
        builder.store(numbers, ir_pointer(builder, target, numbers.type), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, like), generate
