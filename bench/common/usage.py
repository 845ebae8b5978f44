"""Who uses the processors: of a machine's time, what went to processes with a mark in their environment, and theirs."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

MARK = "TRACEHAUL_BENCH_MARK"
"""The variable. Processes inherit it, whoever becomes their parent."""
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """Seconds of all cores."""

    marked: float
    """Of living processes with the mark, their children, and those that these have waited for."""
    busy: float
    """Of all processes."""
    total: float
    """Idle ones too."""

    def since(self, before: "Usage") -> "Usage":
        """What has passed between two of them."""
        return Usage(*(now - then for now, then in zip(self, before, strict=True)))


def usage(mark: str) -> Usage:
    """Up to now: the marked and their children of their lives, the others since the machine started.

    A process that names itself may overwrite its environment, as vLLM's do: it is known by its parent.
    """
    wanted = f"{MARK}={mark}".encode()
    marked: set[int] = set()
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError):  # it ends meanwhile
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                number = int(entry.name)
                parents[number], ticks[number] = int(fields[1]), sum(int(field) for field in fields[11:15])
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    marked.add(number)
    while grown := {number for number, parent in parents.items() if parent in marked} - marked:
        marked |= grown
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy, total = sum(fields) - fields[3] - fields[4], sum(fields)
    return Usage(*(of * _TICK_S for of in (sum(ticks[number] for number in marked), busy, total)))
