"""Products of matrices in registers, and the orders of memory that they want: more words for compiled functions.

As in :mod:`tracehaul.engine.cpu.vectors`, whose generators these build on.
"""

# Code generators have the signatures that numba prescribes and work on values that it does not type.
# pyright: basic

from llvmlite import ir
from numba import types
from numba.core import cgutils

from tracehaul.engine.cpu.compiling import HAS_DOT
from tracehaul.engine.cpu.vectors import (
    BFLOATS,
    F32,
    FLOATS,
    I16,
    I32,
    I64,
    INTS,
    KIND_BYTES,
    LANES,
    ir_call,
    ir_constant,
    ir_fma,
    ir_integers,
    ir_load,
    ir_offset,
    ir_pointer,
    ir_shuffle,
    ir_splat,
    vector,
    word,
)


def _sum_each(builder, vectors):
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
    """Add the products of two loaded pieces; lanes hold partial sums."""
    if like != types.uint16:
        return ir_fma(builder, w, x, accumulator)
    if HAS_DOT:
        return ir_call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [accumulator, w, x])
    for half in (0, 1):
        accumulator = ir_fma(builder, _half(builder, w, half), _half(builder, x, half), accumulator)
    return accumulator


def _half(builder, pairs, odd):
    """The even or the odd ones of 32 bfloat16, as float32."""
    bits = builder.bitcast(pairs, INTS)
    bits = builder.and_(bits, ir_integers(-65536)) if odd else builder.shl(bits, ir_integers(16))
    return builder.bitcast(bits, FLOATS)


def _dots(outputs, rows):
    """Generator of the products of ``outputs`` rows of a matrix and ``rows`` of another: 16 of them."""

    def generate(context, builder, signature, arguments):
        w, w_stride, x, x_stride, length, _ = arguments
        like = signature.args[5]
        step_bytes = 64
        piece = ir.VectorType(I16, 2 * LANES) if like == types.uint16 else FLOATS
        elements = step_bytes // KIND_BYTES[like]

        def fetch(base, stride, at, position):
            address = builder.add(builder.add(base, position), builder.mul(stride, ir.Constant(I64, at)))
            got = ir_load(builder, address, piece, 2)
            return builder.bitcast(got, BFLOATS) if like == types.uint16 and HAS_DOT else got

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
        return _sum_each(builder, [builder.load(cell) for cell in sums])

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


def _tiles(rows, columns, fresh):
    """Generator of ``rows`` times ``16 * columns`` sums, added to what is at ``out`` unless ``fresh``."""

    def generate(context, builder, signature, arguments):
        a, a_stride, b, b_stride, steps, out, out_stride, _ = arguments
        like = signature.args[7]
        pairs = like == types.uint16

        def at(base, stride, row, column):
            row_base = builder.add(base, builder.mul(stride, ir.Constant(I64, row)))
            return ir_offset(builder, row_base, column * LANES * 4)

        cells = {}
        for row in range(rows):
            for column in range(columns):
                first = ir_constant(0.0) if fresh else ir_load(builder, at(out, out_stride, row, column), FLOATS, 4)
                cells[row, column] = cgutils.alloca_once(builder, FLOATS)
                builder.store(first, cells[row, column])
        with cgutils.for_range(builder, steps) as loop:
            b_row = builder.add(b, builder.mul(loop.index, b_stride))
            a_column = builder.add(a, builder.mul(loop.index, ir.Constant(I64, _CELL_BYTES)))
            right = [
                ir_load(builder, ir_offset(builder, b_row, column * LANES * 4), FLOATS, 4) for column in range(columns)
            ]
            for row in range(rows):
                cell_at = builder.add(a_column, builder.mul(a_stride, ir.Constant(I64, row)))
                left = ir_splat(builder, ir_load(builder, cell_at, F32, 2))
                for column in range(columns):
                    cell = cells[row, column]
                    a_cells, b_cells = (_as_pairs(builder, x) if pairs else x for x in (left, right[column]))
                    builder.store(_dot_step(builder, like, a_cells, b_cells, builder.load(cell)), cell)
        for (row, column), cell in cells.items():
            builder.store(builder.load(cell), ir_pointer(builder, at(out, out_stride, row, column), FLOATS), align=4)
        return context.get_dummy_value()

    return generate


def _as_pairs(builder, cells):
    return builder.bitcast(cells, BFLOATS if HAS_DOT else ir.VectorType(I16, 2 * LANES))


def _tile_signature(like):
    return types.void(*[types.int64] * 7, like)


def _make_tile(rows, columns, fresh):
    @word
    def tile(context, a, a_stride, b, b_stride, steps, out, out_stride, like):
        """``tile(a, a_stride, b, b_stride, steps, out, out_stride, like)``: a product by cells of 4 bytes.

        ``a`` has rows of ``steps`` cells, ``b`` has ``steps`` rows of cells, one for each column; ``out`` is float32.
        Strides are in bytes.
        """
        return _tile_signature(like), _tiles(rows, columns, fresh)

    return tile


scores_6, scores_3, scores_1 = (_make_tile(rows, 4, fresh=True) for rows in (6, 3, 1))
"""Fresh sums in 64 columns, for that many rows."""
gather_6, gather_3, gather_1 = (_make_tile(rows, 4, fresh=False) for rows in (6, 3, 1))
"""Adding to what is there, in 64 columns."""
gather_narrow_1 = _make_tile(1, 2, fresh=False)
"""Adding to what is there, for one row in 32 columns."""


@word
def transpose(context, source, source_stride, target, target_stride):
    """``transpose(source, source_stride, target, target_stride)`` of 16 by 16 cells of 4 bytes."""

    def generate(context, builder, signature, arguments):
        source, source_stride, target, target_stride = arguments

        def at(base, stride, row):
            return ir_pointer(builder, builder.add(base, builder.mul(stride, ir.Constant(I64, row))), FLOATS)

        rows = [builder.load(at(source, source_stride, row), align=2) for row in range(LANES)]
        # Each step exchanges the off-diagonal quarters of every square of twice its size.
        size = 1
        while size < LANES:
            for row in range(LANES):
                if row & size:
                    continue
                upper, lower = rows[row], rows[row + size]
                kept = [lane if not lane & size else LANES + lane - size for lane in range(LANES)]
                moved = [lane + size if not lane & size else LANES + lane for lane in range(LANES)]
                rows[row], rows[row + size] = (
                    ir_shuffle(builder, upper, lower, kept),
                    ir_shuffle(builder, upper, lower, moved),
                )
            size *= 2
        for row in range(LANES):
            builder.store(rows[row], at(target, target_stride, row), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


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
