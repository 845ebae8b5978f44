"""Compiled code that is kept is used, by one compilation for all; what is wrong with it costs one more."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tracehaul.engine.cpu import code_cache
from tracehaul.engine.cpu.compiling import compiled
from tracehaul.runtime import kept


def fresh() -> Any:
    """A function as a new process has it."""

    def triple(number):
        return number * 3

    return compiled(triple)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where code is kept in the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tracehaul" / "kernels"


def use(number: float = 7) -> bool:
    """Whether the function, which is right anyway, was compiled for that."""
    function = fresh()
    assert function(number) == number * 3
    return not sum(function.stats.cache_hits.values())


def test_it_is_compiled_once_for_each_kind_of_argument(folder: Path) -> None:
    assert [use(7), use(7), use(0.5), use(0.5), use(7)] == [True, False, True, False, False]
    assert len(list(folder.glob("triple-*"))) == 2


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        flip,
        lambda file: file.write_bytes(file.read_bytes()[:1000]),
        lambda file: kept.write(file, [b"no pickle"]),
        lambda file: kept.write(file, [b"N."]),
    ],
    ids=["a-bit", "torn", "no-pickle", "nothing"],
)
def test_what_is_damaged_is_compiled_anew(harm: Callable[[Path], object], folder: Path) -> None:
    assert use()
    (file,) = folder.glob("triple-*")
    harm(file)
    assert [use(), use()] == [True, False]


def test_other_sources_are_other_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert use()
    monkeypatch.setattr("tracehaul.engine.cpu.compiling._SOURCES", "changed")
    assert [use(), use()] == [True, False]
    monkeypatch.setattr(code_cache, "FILES_MAX", 1)
    assert use(0.5)
    assert len(list(folder.glob("triple-*"))) == 1


def test_without_a_folder_it_is_compiled_each_time(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.parent.write_bytes(b"")
    assert [use(), use()] == [True, True]
    assert "compiled code is not kept" in caplog.text


def test_a_full_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(path: Path, parts: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(code_cache.kept, "write", refuse)
    assert [use(), use()] == [True, True]
    assert "compiled code is not kept" in caplog.text


def test_who_waits_for_another_uses_what_that_one_made(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert use()
    (file,) = folder.glob("triple-*")
    file.rename(folder / "aside")
    with kept.alone(folder / "lock", 0.0) as is_ours:
        assert is_ours
        waiting = threading.Thread(target=lambda: got.append(use()))
        got: list[bool] = []
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        (folder / "aside").rename(file)
    waiting.join(60)
    assert got == [False]


def test_who_waits_too_long_compiles_and_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_cache, "WAIT_S", 0.1)
    folder.mkdir(parents=True)
    with kept.alone(folder / "lock", 0.0) as is_ours:
        assert is_ours
        assert use()
    assert not list(folder.glob("triple-*"))
    assert [use(), use()] == [True, False]


def test_a_function_that_does_not_compile_keeps_nobody_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_cache, "WAIT_S", 0.1)

    def broken(number):
        return number.nothing_of_the_kind

    for _ in range(2):
        with pytest.raises(Exception, match="nothing_of_the_kind"):
            compiled(broken)(1)
    assert [use(), use()] == [True, False]


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="names an x86 processor")
def test_numbas_own_variables_say_what_for(tmp_path: Path) -> None:
    code = "from tracehaul.engine.cpu.compiling import TARGET, TILING; print(*TILING[:2], TARGET.split()[0])"
    environment = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "8", "haswell"]
