"""Reads recordings of agent work from wherever the operator keeps them."""

import json
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

ARCHIVES = (".tar", ".tar.xz", ".tar.gz")


class Trajectory(msgspec.Struct, frozen=True):
    """One recorded agent task with full text."""

    name: str
    messages: list[dict[str, str]]
    """In order; role and content."""


def trajectories(path: Path) -> list[Trajectory]:
    """The mini-swe-agent trajectories in a folder or a tar archive, by name.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it holds no trajectory.
    """
    found = [
        Trajectory(name.removesuffix(".traj.json"), messages_of(json.loads(data)))
        for name, data in sorted(documents(path))
        if name.endswith(".traj.json")
    ]
    if not found:
        raise ValueError(f"{path} holds no *.traj.json")
    return found


def messages_of(document: dict[str, Any]) -> list[dict[str, str]]:
    """Role and content of a trajectory's messages."""
    return [{"role": m["role"], "content": m["content"]} for m in document["messages"]]


def documents(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each JSON or JSONL document in a folder, a tar archive or a file, the latter perhaps packed
    by xz.

    Raises:
        FileNotFoundError: there is no such path.
        tarfile.TarError, lzma.LZMAError: it is damaged.
    """
    if path.is_dir():
        for file in sorted(path.rglob("*.json*")):
            yield file.name, file.read_bytes()
    elif path.name.endswith(ARCHIVES):
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None:
                    yield Path(member.name).name, content.read()
    elif path.suffix == ".xz":
        yield path.stem, lzma.decompress(path.read_bytes())
    else:
        yield path.name, path.read_bytes()


def find(path: Path, workload: str | None) -> Path:
    """Where one workload's documents are: ``path`` itself, or the archive or folder in it that is named so.

    Raises:
        FileNotFoundError: nothing there is named so.
        ValueError: ``path`` is a folder of several archives, and none is named.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if workload is not None:
        within = sorted(path.iterdir()) if path.is_dir() else [path]
        chosen = next((entry for entry in within if entry.name.startswith(workload)), None)
        if chosen is None:
            raise FileNotFoundError(f"nothing in {path} has a name that begins with {workload}")
        return chosen
    packed = [entry.name for entry in sorted(path.iterdir()) if entry.suffix == ".xz"] if path.is_dir() else []
    if packed:
        raise ValueError(f"{path} holds several workloads: name one of {', '.join(packed)}")
    return path
