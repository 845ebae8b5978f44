"""Editions of a model's files."""

import re
from pathlib import Path

from tracehaul.model.revision import SAMPLE_BYTES, revision
from tracehaul.model.source import ModelSource


def of(path: Path) -> str:
    return revision(ModelSource("m", path, "gguf" if path.is_file() else "hf", "llama"))


def test_what_decides_what_a_model_says_decides_its_edition(tmp_path: Path) -> None:
    for name, data in (("config.json", b"{}"), ("model.safetensors", bytes(5 * SAMPLE_BYTES)), ("README.md", b"x")):
        (tmp_path / name).write_bytes(data)
    first = of(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", first)
    (tmp_path / "README.md").write_bytes(b"other")
    assert of(tmp_path) == first
    seen = {first}
    for name, data in (
        ("config.json", b"{ }"),
        ("model.safetensors", bytes(5 * SAMPLE_BYTES - 1) + b"x"),
        ("model.safetensors", bytes(5 * SAMPLE_BYTES + 1)),
        ("tokenizer.json", b"{}"),
    ):
        (tmp_path / name).write_bytes(data)
        seen.add(of(tmp_path))
    assert len(seen) == 5


def test_a_snapshot_of_the_hub_is_its_commit(tmp_path: Path) -> None:
    commit = tmp_path / ("0123456789abcdef" + "0" * 24)
    commit.mkdir()
    assert of(commit) == "0123456789ab"


def test_one_file(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"short")
    first = of(file)
    file.write_bytes(b"other")
    assert of(file) != first
