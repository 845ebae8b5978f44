"""Run by ``test_engine_paged.py``: compiles all kernels for a compute capability, and names those that were."""

import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from tracehaul.engine.paged_attention import _attend, _combine
from tracehaul.engine.paged_kernels import _add_norm, _gate, _place

ARRAYS = {"tables": "*i32", "spans": "*i32", "tiles": "*i32", "shares": "*fp32", "sums": "*fp32", "hidden": "*fp32"}
ARRAYS |= {"weight": "*fp32", "norms": "*fp32", "positions": "*i64", "blocks": "*i64", "offsets": "*i64"}
ARRAYS |= dict.fromkeys(("queries", "kv", "out", "added", "qkv", "cos", "sin", "gate_up"), "*bf16")
NUMBERS = {"scale": "fp32", "eps": "fp32"}


def build(kernel: Any, **constants: object) -> None:
    kinds = {name: ARRAYS.get(name) or NUMBERS.get(name, "i32") for name in kernel.arg_names if name not in constants}
    source = ASTSource(fn=kernel, signature=kinds | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    if "cubin" in compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm:
        sys.stdout.write(f"{kernel.fn.__name__}\n")


SIZES = {"HEADS": 9, "HEAD_DIM": 64, "HEAD_DIM_PADDED": 64}
TILING = {"WINDOW": 0, "GROUP": 3, "GROUP_PADDED": 4, "BLOCK_TOKENS": 32, "TILE_TOKENS": 4, "ROWS": 16, "KEYS": 64}
build(_combine, SPLITS=8, **SIZES)
build(_attend, SPLITS=8, **SIZES, **TILING)
build(_attend, SPLITS=1, **SIZES, **{**TILING, "WINDOW": 100})
build(_add_norm, ADD=True, SIZE=576, PADDED=1024)
build(_place, NORM=True, ROPE=True, HEADS=9, KV_HEADS=3, HALF=32, PADDED=32, ROWS=8)
build(_gate, SIZE=1536, EACH=1024)
