"""Copying and summing in one pass, in machine code made for this machine at first use.

A copy waits for memory, and the sum of what passes is computed meanwhile: it costs next to nothing. Long copies are
stored past the caches, as a store into a cache first fetches the line that it then overwrites: a third of what a copy
moves. See docs/adr/0014-one-pass-over-shared-memory.md.

llvmlite, which makes the code, is loaded at that first use only, and may be missing: see :func:`compiled_here`.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracehaul.runtime.log import Log

BLOCK_BYTES = 1024
"""A copy can be interrupted after so many."""
SUMMED_BYTES_MIN = 241
"""xxh3 sums what is shorter in another way."""

ROW = np.dtype([("source", "u8"), ("target", "u8"), ("left", "u8"), ("nbytes", "u8"), ("sums", "u8", 8)])
"""One copy, of at least ``SUMMED_BYTES_MIN``: addresses of what is left of it, bytes left, and in all. Once none are
left, the first of ``sums`` is the xxh3-64 of the bytes as they were stored.

What is summed as one may be in several pieces, each a row: all but the last say 0 bytes in all, are whole
``BLOCK_BYTES`` and hand their sums on to the row after them; the last says the bytes of all pieces."""

Rows = NDArray[np.void]
Advance = Callable[[int, int, int, bool], int]

log = Log(__name__)

# xxh3's default secret and primes, as published with it.
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_P32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_P64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_START = (_P32[2], _P64[0], _P64[1], _P64[2], _P64[3], _P32[1], _P64[4], _P32[0])
_AVALANCHE = 0x165667919E3779F9
_STRIPE = 64
_STRIPES = BLOCK_BYTES // _STRIPE
# Where in the secret that starts which is used for:
_SCRAMBLING, _LAST, _MERGING = 128, 121, 11


def rows_of(sources: NDArray[np.uint64], targets: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> Rows:
    """Copies of which nothing is done."""
    rows = np.empty(len(sizes), dtype=ROW)
    rows["source"], rows["target"], rows["left"], rows["nbytes"] = sources, targets, sizes, sizes
    rows["sums"] = np.array(_START, dtype=np.uint64)
    return rows


@cache
def compiled(*, summing: bool = True) -> Advance:
    """``advance(address of rows, count, bytes_max, past_caches)``: go on with rows in order; how many it completed.

    Ends in the middle of a copy once ``bytes_max``, at least ``BLOCK_BYTES``, are copied: go on with that row then.
    Runs without the interpreter's lock. When it returns, other processes see what was copied. A source and its target
    must not overlap. ``summing=False`` leaves the sums without meaning, to measure what they cost.

    Raises:
        ImportError: llvmlite is missing.
        RuntimeError: its LLVM is too old (before 0.45), or knows no code for this machine.
    """
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(_source(summing)), machine)
    engine.finalize_object()
    _engines.append(engine)
    signature = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_bool)
    return signature(engine.get_function_address("advance"))


@cache
def compiled_here() -> Advance | None:
    """:func:`compiled`, or None where it cannot be had: once, the log says why."""
    try:
        return compiled()
    except (ImportError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        log.info("shared memory is copied and summed in two passes", why=why)
        return None


_engines: list[Any] = []
"""They own the code."""

# --- in LLVM's assembly


def _source(summing: bool) -> str:
    return "\n".join([_blocks("cached", summing, past=False), _blocks("past", summing, past=True), _finish(), _ADVANCE])


def _vector(values: Sequence[int]) -> str:
    return "<" + ", ".join(f"i64 {value}" for value in values) + ">"


def _secret(at: int) -> str:
    return _vector(struct.unpack_from("<8Q", _SECRET, at))


def _sum(name: str, before: str, data: str, secret: str) -> str:
    """``%sum.<name>``: what has been summed, with one stripe more."""
    return f"""
  %key.{name} = xor <8 x i64> {data}, {secret}
  %low.{name} = and <8 x i64> %key.{name}, {_vector([0xFFFFFFFF] * 8)}
  %high.{name} = lshr <8 x i64> %key.{name}, {_vector([32] * 8)}
  %product.{name} = mul <8 x i64> %low.{name}, %high.{name}
  %swapped.{name} = shufflevector <8 x i64> {data}, <8 x i64> poison,
    <8 x i32> <i32 1, i32 0, i32 3, i32 2, i32 5, i32 4, i32 7, i32 6>
  %added.{name} = add <8 x i64> {before}, %swapped.{name}
  %sum.{name} = add <8 x i64> %added.{name}, %product.{name}"""


def _blocks(name: str, summing: bool, *, past: bool) -> str:
    """Copies ``%count`` blocks."""
    how = f"align {_STRIPE}, !nontemporal !0" if past else "align 1"
    stripes = ""
    for i in range(_STRIPES):
        stripes += f"""
  %source.{i} = getelementptr i8, ptr %source.block, i64 {_STRIPE * i}
  %target.{i} = getelementptr i8, ptr %target.block, i64 {_STRIPE * i}
  %data.{i} = load <8 x i64>, ptr %source.{i}, align 1
  store <8 x i64> %data.{i}, ptr %target.{i}, {how}"""
        if summing:
            stripes += _sum(f"{i}", f"%sum.{i - 1}" if i else "%sum", f"%data.{i}", _secret(8 * i))
    last = f"%sum.{_STRIPES - 1}" if summing else "%sum"
    return f"""
define private void @blocks.{name}(ptr %source, ptr %target, i64 %count, ptr %sums) {{
entry:
  %before = load <8 x i64>, ptr %sums, align 8
  br label %block
block:
  %i = phi i64 [0, %entry], [%i.next, %block]
  %sum = phi <8 x i64> [%before, %entry], [%sum.next, %block]
  %at = mul i64 %i, {BLOCK_BYTES}
  %source.block = getelementptr i8, ptr %source, i64 %at
  %target.block = getelementptr i8, ptr %target, i64 %at{stripes}
  %shifted = lshr <8 x i64> {last}, {_vector([47] * 8)}
  %mixed = xor <8 x i64> {last}, %shifted
  %keyed = xor <8 x i64> %mixed, {_secret(_SCRAMBLING)}
  %sum.next = mul <8 x i64> %keyed, {_vector([_P32[0]] * 8)}
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, %count
  br i1 %more, label %block, label %done
done:
  store <8 x i64> %sum.next, ptr %sums, align 8
  ret void
}}"""


def _finish() -> str:
    """Copies the last 1 to ``BLOCK_BYTES`` of a row that ends a sum; the last stripe overlaps the one before it."""
    merge = ""
    for i in range(4):
        low, high = struct.unpack_from("<2Q", _SECRET, _MERGING + 16 * i)
        merge += f"""
  %a.{i} = extractelement <8 x i64> %sum.last, i64 {2 * i}
  %b.{i} = extractelement <8 x i64> %sum.last, i64 {2 * i + 1}
  %x.{i} = xor i64 %a.{i}, {low}
  %y.{i} = xor i64 %b.{i}, {high}
  %wide.x.{i} = zext i64 %x.{i} to i128
  %wide.y.{i} = zext i64 %y.{i} to i128
  %wide.{i} = mul i128 %wide.x.{i}, %wide.y.{i}
  %lower.{i} = trunc i128 %wide.{i} to i64
  %shifted.{i} = lshr i128 %wide.{i}, 64
  %upper.{i} = trunc i128 %shifted.{i} to i64
  %folded.{i} = xor i64 %lower.{i}, %upper.{i}
  %merged.{i} = add i64 {f"%merged.{i - 1}" if i else "%length"}, %folded.{i}"""
    bytes_of = "".join(f"\\{byte:02x}" for byte in _SECRET)
    return f"""
@secret = private constant [{len(_SECRET)} x i8] c"{bytes_of}"

define private void @finish(ptr %source, ptr %target, i64 %left, i64 %nbytes, ptr %sums) {{
entry:
  %before = load <8 x i64>, ptr %sums, align 8
  %before.last = sub i64 %left, 1
  %whole = udiv i64 %before.last, {_STRIPE}
  %any = icmp ne i64 %whole, 0
  br i1 %any, label %stripe, label %last
stripe:
  %i = phi i64 [0, %entry], [%i.next, %stripe]
  %sum = phi <8 x i64> [%before, %entry], [%sum.stripe, %stripe]
  %at = mul i64 %i, {_STRIPE}
  %source.stripe = getelementptr i8, ptr %source, i64 %at
  %target.stripe = getelementptr i8, ptr %target, i64 %at
  %data = load <8 x i64>, ptr %source.stripe, align 1
  store <8 x i64> %data, ptr %target.stripe, align 1
  %secret.at = mul i64 %i, 8
  %secret.stripe = getelementptr i8, ptr @secret, i64 %secret.at
  %secret = load <8 x i64>, ptr %secret.stripe, align 1{_sum("stripe", "%sum", "%data", "%secret")}
  %i.next = add i64 %i, 1
  %more = icmp ult i64 %i.next, %whole
  br i1 %more, label %stripe, label %last
last:
  %sum.whole = phi <8 x i64> [%before, %entry], [%sum.stripe, %stripe]
  %at.last = sub i64 %left, {_STRIPE}
  %source.last = getelementptr i8, ptr %source, i64 %at.last
  %target.last = getelementptr i8, ptr %target, i64 %at.last
  %data.last = load <8 x i64>, ptr %source.last, align 1
  store <8 x i64> %data.last, ptr %target.last, align 1{_sum("last", "%sum.whole", "%data.last", _secret(_LAST))}
  %length = mul i64 %nbytes, {_P64[0]}{merge}
  %shifted = lshr i64 %merged.3, 37
  %mixed = xor i64 %merged.3, %shifted
  %multiplied = mul i64 %mixed, {_AVALANCHE}
  %shifted.again = lshr i64 %multiplied, 32
  %digest = xor i64 %multiplied, %shifted.again
  store i64 %digest, ptr %sums
  ret void
}}"""


_ADVANCE = f"""
%row = type {{ ptr, ptr, i64, i64, [8 x i64] }}

define i64 @advance(ptr %rows, i64 %count, i64 %bytes.max, i1 zeroext %past) {{
entry:
  br label %row
row:
  %done = phi i64 [0, %entry], [%done.next, %row.done]
  %room = phi i64 [%bytes.max, %entry], [%room.next, %row.done]
  %own = getelementptr %row, ptr %rows, i64 %done
  %target.at = getelementptr %row, ptr %own, i64 0, i32 1
  %left.at = getelementptr %row, ptr %own, i64 0, i32 2
  %nbytes.at = getelementptr %row, ptr %own, i64 0, i32 3
  %sums = getelementptr %row, ptr %own, i64 0, i32 4
  %source = load ptr, ptr %own
  %target = load ptr, ptr %target.at
  %left = load i64, ptr %left.at
  %nbytes = load i64, ptr %nbytes.at
  %goes.on = icmp eq i64 %nbytes, 0
  %kept = select i1 %goes.on, i64 0, i64 1
  %before.last = sub i64 %left, %kept
  %whole = udiv i64 %before.last, {BLOCK_BYTES}
  %fitting = udiv i64 %room, {BLOCK_BYTES}
  %blocks = call i64 @llvm.umin.i64(i64 %whole, i64 %fitting)
  %none = icmp eq i64 %blocks, 0
  br i1 %none, label %moved, label %move
move:
  %address = ptrtoint ptr %target to i64
  %uneven = and i64 %address, {_STRIPE - 1}
  %even = icmp eq i64 %uneven, 0
  %past.here = and i1 %past, %even
  br i1 %past.here, label %move.past, label %move.cached
move.past:
  call void @blocks.past(ptr %source, ptr %target, i64 %blocks, ptr %sums)
  br label %moved
move.cached:
  call void @blocks.cached(ptr %source, ptr %target, i64 %blocks, ptr %sums)
  br label %moved
moved:
  %moved.bytes = mul i64 %blocks, {BLOCK_BYTES}
  %source.left = getelementptr i8, ptr %source, i64 %moved.bytes
  %target.left = getelementptr i8, ptr %target, i64 %moved.bytes
  %left.now = sub i64 %left, %moved.bytes
  %room.now = sub i64 %room, %moved.bytes
  %cut = icmp ult i64 %blocks, %whole
  br i1 %cut, label %interrupted, label %rest
interrupted:
  store ptr %source.left, ptr %own
  store ptr %target.left, ptr %target.at
  store i64 %left.now, ptr %left.at
  br label %end
rest:
  br i1 %goes.on, label %hand.on, label %last.piece
hand.on:
  %sums.next = getelementptr %row, ptr %own, i64 1, i32 4
  %sums.now = load <8 x i64>, ptr %sums, align 8
  store <8 x i64> %sums.now, ptr %sums.next, align 8
  br label %row.done
last.piece:
  call void @finish(ptr %source.left, ptr %target.left, i64 %left.now, i64 %nbytes, ptr %sums)
  br label %row.done
row.done:
  store i64 0, ptr %left.at
  %done.next = add i64 %done, 1
  %room.next = sub i64 %room.now, %left.now
  %rows.left = icmp ult i64 %done.next, %count
  %room.left = icmp sge i64 %room.next, {BLOCK_BYTES}
  %more = and i1 %rows.left, %room.left
  br i1 %more, label %row, label %end
end:
  %done.now = phi i64 [%done, %interrupted], [%done.next, %row.done]
  fence seq_cst
  ret i64 %done.now
}}

declare i64 @llvm.umin.i64(i64, i64)

!0 = !{{i32 1}}
"""
