"""Logs whose writers hold them open stay small, and lose nothing that is still to be read."""

import os
from pathlib import Path

from cluster.hosts.logs import before, keep_small, last_lines


def test_a_large_log_begins_anew_and_its_writer_goes_on(tmp_path: Path):
    path = tmp_path / "store-0.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"one\ntwo\n")
        assert not keep_small(path, 8)
        writer.write(b"three\n")
        assert keep_small(path, 8)
        writer.write(b"four\n")
    assert path.read_bytes() == b"four\n"
    assert before(path).read_bytes() == b"one\ntwo\nthree\n"
    assert last_lines(path, 2) == ["three", "four"]
    assert last_lines(path, 99) == ["one", "two", "three", "four"]
    assert last_lines(path, 0) == []


def test_where_the_old_part_cannot_be_kept_the_log_is_small_all_the_same(tmp_path: Path):
    full = Path("/dev/full")
    path = tmp_path / "store-0.log"
    path.write_bytes(b"x" * 100)
    os.symlink(full, before(path))
    assert keep_small(path, 8)
    assert path.read_bytes() == b""
    assert full.exists()
    assert not before(path).is_symlink()


def test_no_log_is_no_fault(tmp_path: Path):
    assert not keep_small(tmp_path / "none.log")
    assert last_lines(tmp_path / "none.log", 3) == []
