"""Which edition of a model's files it is: told from all that decides what the model says, without reading all of it."""

import re
from pathlib import Path

from blake3 import blake3

from tracehaul.model.source import ModelSource

DIGITS = 12
SAMPLE_BYTES = 1 << 16
"""Of each end of a large file; its size counts too."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".txt")


def revision(source: ModelSource) -> str:
    """Twelve hexadecimal digits; the beginning of the commit where the files are a hub's snapshot.

    Raises:
        OSError: a file cannot be read.
    """
    path = source.path
    if path.is_dir():
        name = path.resolve().name
        if _COMMIT.fullmatch(name):
            return name[:DIGITS]
        return _digest(sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file()))
    return _digest([path])


def _digest(files: list[Path]) -> str:
    digest = blake3()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as data:
            digest.update(data.read(SAMPLE_BYTES))
            data.seek(max(SAMPLE_BYTES, size - SAMPLE_BYTES))
            digest.update(data.read(SAMPLE_BYTES))
    return digest.hexdigest()[:DIGITS]
