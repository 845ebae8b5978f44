"""Compiled code that is kept in the user's cache folder: one process of a machine compiles, the others wait for it.

In the place of numba's own cache, which does not wait, and whose index and code are two files: processes that write at
once, or one that is killed between the two, leave an index that names other code than it says.
"""

# numba types neither its caches nor what they hold.
# pyright: basic

import pickle
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llvmlite
import numba
from blake3 import blake3
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from tracehaul.model.source import user_cache_dir
from tracehaul.runtime import clock, kept
from tracehaul.runtime.log import Log

log = Log(__name__)

WAIT_S = 120.0
"""For another process that compiles; after that this one compiles, too."""
FILES_MAX = 32
"""Of one function: each kind of numbers, each processor and each version has its own."""


class CodeCache(NullCache):
    """Implements numba's cache of one function. ``sources`` says what it is compiled from."""

    def __init__(self, function: Callable[..., Any], sources: str) -> None:
        self._name = function.__name__
        self._made_of = (sources, sys.version, numba.__version__, llvmlite.__version__)

    def load_overload(self, sig, target_context):
        """The compiled function; None if the caller is to compile it."""
        target_context.refresh()  # as numba's own does: there may be new types since
        folder = _folder()
        if folder is None:
            return None
        path = self._path(folder, sig, target_context.codegen())
        found = _load(path, target_context)
        if found is not None:
            return found
        log.info("not compiled for this machine yet", function=self._name)
        if _turn.take(folder):
            # Another may have compiled it while this one waited.
            found = _load(path, target_context)
            if found is not None:
                _turn.end()
                return found
        log.info("compiling", function=self._name)
        return None

    def save_overload(self, sig, data):
        """Keep what was compiled, if it was this process's turn."""
        if _turn.folder is None:
            return
        folder, seconds = _turn.folder, clock.perf_s() - _turn.began_s
        try:
            kept.write(self._path(folder, sig, data.codegen), [dumps(data._reduce())])
            kept.forget_old(folder, f"{self._name}-*", FILES_MAX)
            log.info("compiled", function=self._name, seconds=seconds)
        except OSError as error:
            log.warning("compiled code is not kept: each start compiles it", folder=folder, reason=error)
        finally:
            _turn.end()

    def _path(self, folder: Path, sig, codegen) -> Path:
        """Its name tells apart kinds of arguments, processors, and versions of everything that makes the code."""
        key = repr((str(sig), codegen.magic_tuple(), self._made_of))
        return folder / f"{self._name}-{blake3(key.encode()).hexdigest(16)}"


class _Turn:
    """To compile. numba asks for one function at a time, and tells nobody when it fails: the next take ends that."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        """None: it is not this process's."""
        self.began_s = 0.0
        self._lock = ExitStack()

    def take(self, folder: Path) -> bool:
        """Wait for it; False: it cannot be had."""
        self.end()
        try:
            if self._lock.enter_context(kept.alone(folder / "lock", WAIT_S)):
                self.folder, self.began_s = folder, clock.perf_s()
                return True
            log.warning("not waiting longer for another process that compiles", waited_s=WAIT_S)
        except OSError as error:
            log.warning("compiled code is not kept: each start compiles it", folder=folder, reason=error)
        self.end()
        return False

    def end(self) -> None:
        """Let the next process compile."""
        self.folder = None
        self._lock.close()


_turn = _Turn()


def _folder() -> Path | None:
    """Where compiled code is kept; None: nowhere."""
    try:
        folder = user_cache_dir() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("compiled code is not kept: each start compiles it", reason=error)
        return None
    return folder


def _load(path: Path, target_context: Any) -> Any:
    content = kept.read(path)
    if content is None:
        return None
    try:
        return CompileResult._rebuild(target_context, *pickle.loads(content))  # noqa: S301 - this user's own file
    except Exception as error:  # whatever is wrong with it, compiling anew mends it
        log.warning("compiled code cannot be used", path=path, reason=repr(error))
        return None
