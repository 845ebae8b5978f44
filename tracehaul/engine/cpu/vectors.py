"""Vectors of 16 floats for functions compiled at run time: what :mod:`tracehaul.engine.cpu.kernels` is written in.

Every name with a lower-case signature below works inside compiled functions only. Addresses are plain integers:
nothing checks them. ``like`` is a number whose type says what memory holds: ``float32``, ``int8``, or ``uint16`` for
bfloat16, which numpy does not know.
"""

# Code generators have the signatures that numba prescribes and work on values that it does not type.
# pyright: basic

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, register_model

from tracehaul.engine.cpu.compiling import TILING
from tracehaul.engine.cpu.tiling import LANES


def word(generator: Callable[..., Any]) -> Callable[..., Any]:
    """A function for compiled functions: what numba calls an intrinsic."""
    return intrinsic(generator)


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="f32x16")


vector = _VectorType()

I8, I16, I32, I64, F32 = *(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType()
FLOATS = ir.VectorType(F32, LANES)
INTS = ir.VectorType(I32, LANES)


@register_model(_VectorType)
class _VectorModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, FLOATS)


class _BFloat(ir.Type):
    """LLVM's bfloat16, which llvmlite does not name."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)


# --- helpers of the generators ------------------------------------------------------------------------------


def ir_constant(value: float) -> ir.Constant:
    """A number in every lane."""
    return ir.Constant(FLOATS, [value] * LANES)


def ir_integers(value: int) -> ir.Constant:
    """An integer in every lane."""
    return ir.Constant(INTS, [value] * LANES)


def ir_pointer(builder, address, kind):
    """An address as a pointer to ``kind``."""
    return builder.inttoptr(address, kind.as_pointer())


def ir_load(builder, address, kind, align):
    """What lies at an address, known to be a multiple of ``align``."""
    return builder.load(ir_pointer(builder, address, kind), align=align)


def ir_offset(builder, address, count):
    """An address some bytes further."""
    return builder.add(address, ir.Constant(I64, count))


def _widen(builder, halves):
    """<n x i16> bfloat16 to <n x float>."""
    n = halves.type.count
    wide = builder.zext(halves, ir.VectorType(I32, n))
    return builder.bitcast(builder.shl(wide, ir.Constant(wide.type, [16] * n)), ir.VectorType(F32, n))


def _rounded(builder, value):
    """<16 x float> as integers whose upper halves are bfloat16, to nearest even."""
    bits = builder.bitcast(value, INTS)
    odd = builder.and_(builder.lshr(bits, ir_integers(16)), ir_integers(1))
    return builder.add(builder.add(bits, ir_integers(0x7FFF)), odd)


def _narrow(builder, value):
    """<16 x float> to bfloat16 bits."""
    return builder.trunc(builder.lshr(_rounded(builder, value), ir_integers(16)), ir.VectorType(I16, LANES))


def ir_call(builder, name, result, arguments):
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def ir_fma(builder, a, b, c):
    """``a * b + c``, rounded once."""
    return ir_call(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


def ir_splat(builder, scalar, lanes=LANES):
    """A scalar in every lane."""
    nothing = ir.Constant(ir.VectorType(F32, lanes), ir.Undefined)
    one = builder.insert_element(nothing, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def ir_shuffle(builder, a, b, lanes):
    """Lanes of two vectors, by number."""
    return builder.shuffle_vector(a, b, ir.Constant(INTS, lanes))


def ir_expect(builder, address):
    """See :func:`expect`."""
    line = ir_pointer(builder, address, I8)
    kind = ir.FunctionType(ir.VoidType(), [line.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [line, *(ir.Constant(I32, n) for n in (0, 2, 1))])


# --- memory -------------------------------------------------------------------------------------------------

KIND_BYTES = {types.float32: 4, types.uint16: 2, types.int8: 1}


def ir_wide_load(builder, address, like, lanes=LANES):
    """Numbers of any kind as float32."""
    if like == types.uint16:
        return _widen(builder, ir_load(builder, address, ir.VectorType(I16, lanes), 2))
    if like == types.int8:
        return builder.sitofp(ir_load(builder, address, ir.VectorType(I8, lanes), 1), ir.VectorType(F32, lanes))
    return ir_load(builder, address, ir.VectorType(F32, lanes), 4)


@word
def size_of(context, like):
    """``size_of(like) -> int``: bytes of one number."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(I64, KIND_BYTES[signature.args[0]])

    return types.int64(like), generate


def ir_operand(like):
    """See :func:`operand`."""
    return types.uint16 if like == types.uint16 and TILING.pairs else types.float32


@word
def operand(context, like):
    """``operand(like)``: as what products read such numbers: bfloat16 where the processor multiplies it, else float32.

    Activations are rounded to what ``like`` says, and kept as this.
    """

    def generate(context, builder, signature, arguments):
        kind = signature.return_type
        return ir.Constant(context.get_value_type(kind), 0)

    return ir_operand(like)(like), generate


@word
def settle(context, value, like, held):
    """``settle(vector, like, held) -> vector``: rounded to ``like``, where to be kept as ``held`` rounds less."""

    def generate(context, builder, signature, arguments):
        value, (_, like, held) = arguments[0], signature.args
        if like != types.uint16 or held == like:
            return value
        return builder.bitcast(builder.and_(_rounded(builder, value), ir_integers(-65536)), FLOATS)

    return vector(vector, like, held), generate


@word
def load(context, address, like):
    """``load(address, like) -> vector``."""

    def generate(context, builder, signature, arguments):
        return ir_wide_load(builder, arguments[0], signature.args[1])

    return vector(types.int64, like), generate


@word
def store(context, address, value, like):
    """``store(address, vector, like)``, rounded to what memory holds: float32 or bfloat16."""

    def generate(context, builder, signature, arguments):
        address, value, _ = arguments
        value = _narrow(builder, value) if signature.args[2] == types.uint16 else value
        builder.store(value, ir_pointer(builder, address, value.type), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, vector, like), generate


@word
def expect(context, address):
    """``expect(address)``: bring a line of memory nearer, for a load that is to come."""

    def generate(context, builder, signature, arguments):
        ir_expect(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@word
def load_one(context, address):
    """``load_one(address) -> float32``."""

    def generate(context, builder, signature, arguments):
        return ir_load(builder, arguments[0], F32, 4)

    return types.float32(types.int64), generate


@word
def store_one(context, address, value):
    """``store_one(address, float32)``."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[1], ir_pointer(builder, arguments[0], F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@word
def claim(context, address, count):
    """``claim(address, count) -> int``: add to an integer that threads share; returns what it was."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", ir_pointer(builder, arguments[0], I64), arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@word
def peek(context, address):
    """``peek(address) -> int``: read an integer that threads share, and see what was written before it."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(ir_pointer(builder, arguments[0], I64), "acquire", 8)

    return types.int64(types.int64), generate


# --- arithmetic ---------------------------------------------------------------------------------------------


def _elementwise(arity, emit):
    def generate(context, builder, signature, arguments):
        return emit(builder, *arguments)

    return vector(*[vector] * arity), generate


@word
def add(context, a, b):
    """``add(vector, vector) -> vector``."""
    return _elementwise(2, lambda builder, x, y: builder.fadd(x, y))


@word
def sub(context, a, b):
    """``sub(vector, vector) -> vector``."""
    return _elementwise(2, lambda builder, x, y: builder.fsub(x, y))


@word
def mul(context, a, b):
    """``mul(vector, vector) -> vector``."""
    return _elementwise(2, lambda builder, x, y: builder.fmul(x, y))


@word
def div(context, a, b):
    """``div(vector, vector) -> vector``."""
    return _elementwise(2, lambda builder, x, y: builder.fdiv(x, y))


@word
def fma(context, a, b, c):
    """``fma(a, b, c) -> vector``: ``a * b + c`` rounded once."""
    return _elementwise(3, ir_fma)


@word
def larger(context, a, b):
    """``larger(vector, vector) -> vector``."""
    return _elementwise(2, lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))


@word
def splat(context, value):
    """``splat(float32) -> vector``: the number in every lane."""

    def generate(context, builder, signature, arguments):
        return ir_splat(builder, arguments[0])

    return vector(types.float32), generate


@word
def first_lanes(context, value, count, otherwise):
    """``first_lanes(vector, count, vector) -> vector``: the first ``count`` lanes of one, the rest of the other."""

    def generate(context, builder, signature, arguments):
        value, count, otherwise = arguments
        count = builder.trunc(count, I32)
        limit = builder.insert_element(ir.Constant(INTS, ir.Undefined), count, ir.Constant(I32, 0))
        limit = builder.shuffle_vector(limit, ir.Constant(INTS, ir.Undefined), ir_integers(0))
        inside = builder.icmp_signed("<", ir.Constant(INTS, list(range(LANES))), limit)
        return builder.select(inside, value, otherwise)

    return vector(vector, types.int64, vector), generate


def _reduced(fold):
    def generate(context, builder, signature, arguments):
        value, width = arguments[0], LANES
        while width > 1:
            width //= 2
            value = fold(builder, value, ir_shuffle(builder, value, value, [lane ^ width for lane in range(LANES)]))
        return builder.extract_element(value, ir.Constant(I32, 0))

    return types.float32(vector), generate


@word
def total(context, value):
    """``total(vector) -> float32``: the sum of its lanes."""
    return _reduced(lambda builder, x, y: builder.fadd(x, y))


@word
def largest(context, value):
    """``largest(vector) -> float32``."""
    return _reduced(lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))


_EXP2_TERMS = tuple(math.log(2.0) ** at / math.factorial(at) for at in range(6, -1, -1))
"""Taylor's series of 2 ** x: within half of zero its rest is around float32's resolution."""


def _exp2(builder, value):
    low, high = ir_constant(-126.0), ir_constant(126.0)
    value = builder.select(builder.fcmp_ordered(">", value, low), value, low)
    value = builder.select(builder.fcmp_ordered("<", value, high), value, high)
    whole = ir_call(builder, f"llvm.rint.v{LANES}f32", FLOATS, [value])
    rest = builder.fsub(value, whole)
    series = ir_constant(_EXP2_TERMS[0])
    for term in _EXP2_TERMS[1:]:
        series = ir_fma(builder, series, rest, ir_constant(term))
    power = builder.shl(builder.fptosi(whole, INTS), ir_integers(23))
    return builder.bitcast(builder.add(builder.bitcast(series, INTS), power), FLOATS)


@word
def exp2(context, value):
    """``exp2(vector) -> vector``: two to that power, for arguments held within +-126; of 0 it is exactly 1."""
    return _elementwise(1, _exp2)
