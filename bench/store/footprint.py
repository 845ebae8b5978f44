"""What the store's client costs a program that imports it: time, and room where it is installed."""

import json
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from statistics import median

import kvstore
import tracehaul
from bench.common.report import Result

IMPORT = """
import json, time
began_s, began_cpu_s = time.perf_counter(), time.process_time()
import {module}
print(json.dumps([time.perf_counter() - began_s, time.process_time() - began_cpu_s]))
"""
BASE = ("blake3", "msgspec", "numpy", "xxhash")
"""What tracehaul-store brings along; with the extra ``shm`` llvmlite, too."""
OURS = [Path(kvstore.__path__[0]), *(Path(tracehaul.__path__[0]) / p for p in ("rpc", "runtime", "transfer", "wire"))]


def footprint(rounds: int) -> list[Result]:
    """Imports in processes of their own, numpy and asyncio alone by turns with them, after one that is not counted."""
    times: dict[str, list[list[float]]] = {"kvstore.client": [], "asyncio, numpy": []}
    for _ in range(rounds + 1):
        for module, took in times.items():
            command = [sys.executable, "-c", IMPORT.format(module=module)]
            took.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    (wall_s, cpu_s), (least_s, least_cpu_s) = (
        [median(column) for column in zip(*took[1:], strict=True)] for took in times.values()
    )
    ours = sum(path.stat().st_size for folder in OURS for path in folder.rglob("*.py"))
    base = (ours + sum(map(_installed, BASE))) / 1e6
    return [
        Result("numpy.import", least_s, "s"),
        Result("store.import", wall_s, "s", "numpy.import", wall_s / least_s),
        Result("numpy.import.cpu", least_cpu_s, "s"),
        Result("store.import.cpu", cpu_s, "s", "numpy.import.cpu", cpu_s / least_cpu_s),
        Result("store.installed.own", ours / 1e6, "MB"),
        Result("store.installed", base, "MB"),
        Result("store.installed.shm", base + _installed("llvmlite") / 1e6, "MB"),
    ]


def _installed(name: str) -> int:
    """Bytes of a distribution's files, compiled modules left out."""
    files = [file.locate() for file in distribution(name).files or () if file.suffix != ".pyc"]
    return sum(Path(str(path)).stat().st_size for path in files)
