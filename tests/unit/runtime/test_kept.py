"""Kept files: whole or not there, whatever happened to who wrote them; and one process at a time to make one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tracehaul.runtime import kept

CONTENT = b"what took a while to compute" * 50


def test_what_was_written_is_read_and_may_be_changed_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "it"
    kept.write(file, [CONTENT[:7], memoryview(CONTENT)[7:]])
    content = kept.read(file)
    assert content is not None
    assert content == CONTENT
    content[0] = 0
    assert kept.read(file) == CONTENT
    kept.write(file, [b"new"])
    assert kept.read(file) == b"new"
    assert content[1:] == CONTENT[1:]  # who reads the old one keeps it
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:20], id="cut-off-in-the-header"),
        pytest.param(lambda data: data[:-1], id="cut-off"),
        pytest.param(lambda data: data + b"x", id="longer"),
        pytest.param(lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:], id="one-bit"),
        pytest.param(lambda data: b"x" + data[1:], id="foreign"),
        pytest.param(lambda data: data[:64] + bytes(len(data) - 64), id="zeros-after-a-crash"),
    ],
)
def test_what_is_torn_or_foreign_is_not_read(harm, tmp_path: Path) -> None:
    file = tmp_path / "it"
    kept.write(file, [CONTENT])
    file.write_bytes(harm(file.read_bytes()))
    assert kept.read(file) is None
    kept.write(file, [CONTENT])
    assert kept.read(file) == CONTENT


def test_what_is_not_there_is_not_read(tmp_path: Path) -> None:
    assert kept.read(tmp_path / "no" / "file") is None
    assert kept.read(tmp_path) is None


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    def parts():
        yield b"half"
        raise OSError("no space left")

    file = tmp_path / "it"
    kept.write(file, [CONTENT])
    with pytest.raises(OSError, match="no space"):
        kept.write(file, parts())
    assert kept.read(file) == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def in_another_process(code: str, *arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", f"import sys, os\nfrom pathlib import Path\n{code}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE)


KILLED_WRITER = """
from tracehaul.runtime import kept
folder = Path(sys.argv[1])
def parts():
    yield b"half"
    os.kill(os.getpid(), 9)
with kept.alone(folder / "lock", 0.0) as is_ours:
    assert is_ours
    kept.write(folder / "it", parts())
"""


def test_a_killed_writer_leaves_no_file_and_no_lock(tmp_path: Path) -> None:
    with in_another_process(KILLED_WRITER, str(tmp_path)) as writer:
        assert writer.wait(30) == -signal.SIGKILL
    assert kept.read(tmp_path / "it") is None
    with kept.alone(tmp_path / "lock", 0.0) as is_ours:
        assert is_ours
        kept.write(tmp_path / "it.2", [CONTENT])
        kept.forget_old(tmp_path, "it*", 5)
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "it.2"}


HOLDER = """
from tracehaul.runtime import kept
with kept.alone(Path(sys.argv[1]), 0.0) as is_ours:
    print(is_ours, flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with in_another_process(HOLDER, str(lock)) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"True\n"
        with kept.alone(lock, 0.1) as is_ours:
            assert not is_ours
        holder.stdin.close()
        with kept.alone(lock, 30.0) as is_ours:
            assert is_ours


def test_those_used_last_stay(tmp_path: Path) -> None:
    for at, name in enumerate(("a.1", "a.2", "a.3", "b.1")):
        kept.write(tmp_path / name, [CONTENT])
        os.utime(tmp_path / name, (at, at))
    assert kept.read(tmp_path / "a.1") == CONTENT  # which counts as used now
    kept.forget_old(tmp_path, "a.*", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"a.1", "a.3", "b.1"}
