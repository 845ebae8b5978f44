"""How functions are compiled: for which processor, with which of numba's options, and where the code is kept."""

# numba types neither its options nor what it makes.
# pyright: basic

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from blake3 import blake3
from llvmlite.binding import get_host_cpu_name
from numba import config, njit
from numba.core.codegen import get_host_cpu_features

from tracehaul.engine.cpu.code_cache import CodeCache
from tracehaul.engine.cpu.tiling import tiling

F = TypeVar("F", bound=Callable[..., Any])

_SOURCES = blake3(
    b"".join(
        (Path(__file__).parent / f"{name}.py").read_bytes()
        for name in ("compiling", "tiling", "vectors", "products", "panels", "linear", "phases", "attending", "kernels")
    )
).hexdigest()
"""What everything that was compiled comes from."""
# numba's own variables, NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, may name another processor than this machine's.
_settings: Any = config
_FEATURES: str = get_host_cpu_features() if _settings.CPU_FEATURES is None else _settings.CPU_FEATURES
TILING = tiling(platform.machine(), _FEATURES)
"""How products are laid out on the processor that functions are compiled for."""
TARGET = f"{_settings.CPU_NAME or get_host_cpu_name()} {_FEATURES} {_SOURCES}"
"""What functions are compiled for, and from."""

# Vectors are written out here: to let LLVM look for more only costs a third of the time that compiling takes.
_settings.LOOP_VECTORIZE = _settings.SLP_VECTORIZE = 0


def _jit(**options: Any) -> Any:
    untyped: Any = njit
    return untyped(nogil=True, error_model="numpy", no_cfunc_wrapper=True, **options)


def compiled(function: F) -> F:
    """Compile on first use, for the machine at hand; runs without the interpreter's lock."""
    dispatcher = _jit()(function)
    # numba's own looks for changes in the function's own file only, and these functions call others' in other files.
    dispatcher._cache = CodeCache(function, _SOURCES)
    return cast(F, dispatcher)


def inner(function: F) -> F:
    """Compile as a part of the compiled functions that call it, to which alone it is known."""
    return cast(F, _jit(no_cpython_wrapper=True)(function))
