"""Reads recordings of agent work from wherever the operator keeps them."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec


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
        Trajectory(name.removesuffix(".traj.json"), _messages(json.loads(data)))
        for name, data in sorted(_files(path))
        if name.endswith(".traj.json")
    ]
    if not found:
        raise ValueError(f"{path} holds no *.traj.json")
    return found


def _messages(document: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": m["role"], "content": m["content"]} for m in document["messages"]]


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in path.rglob("*.json"):
            yield file.name, file.read_bytes()
        return
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None:
                yield Path(member.name).name, content.read()
