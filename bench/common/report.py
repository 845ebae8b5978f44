"""The form of every measurement: what was run, where, and named results with their baseline of the same run."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table


class Result(msgspec.Struct, frozen=True):
    """One figure under its stable name."""

    name: str
    value: float
    unit: str
    versus: str | None = None
    """The baseline of the same run."""
    ratio: float | None = None
    """Value divided by the baseline."""


class Report(msgspec.Struct, frozen=True):
    """What a bench writes with ``--json``."""

    machine: dict[str, Any]
    commit: str
    config: dict[str, Any]
    results: list[Result]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    memory_kib = int(Path("/proc/meminfo").read_text().split(maxsplit=2)[1])
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of all are at most; there must be one."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def commit() -> str:
    """The commit of the tree that was measured; marked if it was changed."""
    root = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    return (head + "-dirty" if git("status", "--porcelain", "--untracked-files=no") else head) or "unknown"


def finish(config: dict[str, Any], results: list[Result], json: Path | None, console: Console) -> None:
    """Show the table, and write the JSON where it was asked for."""
    table = Table("name", "value", "unit", "versus", "ratio")
    for column in (1, 4):
        table.columns[column].justify = "right"
    for r in results:
        table.add_row(r.name, f"{r.value:.4g}", r.unit, r.versus or "", "" if r.ratio is None else f"{r.ratio:.3f}")
    console.print(table)
    if json is not None:
        report = Report(machine(), commit(), config, results)
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
        console.print(f"written to {json}")
