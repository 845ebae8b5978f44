"""Does a large pull starve a small one? One-block pulls alone, and beside a pull of 10 GB.

Both go from the same owner to the same client process, once by the transport alone (``transfer.fairness.*``) and once
through the store's client with leases and checksums (``transfer.fairness.store.*``).
"""

import os
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.common.processes import Place, Process, running
from bench.common.report import Result, finish, percentile
from bench.store.fairness_process import BLOCK_BYTES, LARGE_BLOCKS, SMALL_BLOCKS

LARGE_BYTES = 10 * 10**9 // BLOCK_BYTES * BLOCK_BYTES
ALONE = 500
"""Small pulls without the large one."""
BESIDE = 500
"""Small pulls beside it at least, if so many fit into ROUNDS_MAX large ones."""
ROUNDS_MAX = 6
HERE = Place("127.0.0.1", environment={"UCX_TLS": "tcp"})

console = Console()


def measure(name: str, nbytes: int, levels: list[str]) -> list[Result]:
    """One transport at each level."""
    results: list[Result] = []
    client = Process(HERE, name, module="bench.store.fairness_process")
    arena_bytes = (LARGE_BLOCKS + SMALL_BLOCKS + 64) * BLOCK_BYTES
    node = Process(HERE, "node", name, HERE.host, str(arena_bytes), str(BLOCK_BYTES))
    with console.status(f"pulling ({name})"), running(node, client):
        client.hear()
        client.ask(do="attach", info=node.hear())
        for level in levels:
            prefix = f"transfer.fairness.{name}" if level == "transfer" else f"transfer.fairness.store.{name}"
            alone = client.ask(do="alone", level=level, times=ALONE)["ms"]
            beside: list[float] = []
            rates: list[float] = []
            while len(beside) < BESIDE and len(rates) < ROUNDS_MAX:
                once = client.ask(do="beside", level=level, nbytes=nbytes)
                beside += once["ms"]
                rates.append(once["gb_per_s"])
            for suffix, share in ((".p50", 0.5), ("", 0.99)):
                base = percentile(alone, share)
                value = percentile(beside, share)
                results.append(Result(f"{prefix}.alone{suffix}", base, "ms"))
                results.append(Result(prefix + suffix, value, "ms", f"{prefix}.alone{suffix}", value / base))
            results.append(Result(f"{prefix}.pulls", len(beside), "1"))
            results.append(Result(f"{prefix}.rate", median(rates), "GB/s"))
    return results


def main(
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="shm, tcp, nixl or ucxx; the first three if not given.")
    ] = None,
    level: Annotated[list[str] | None, typer.Option(help="transfer or store; both if not given.")] = None,
    quick: Annotated[bool, typer.Option(help="A large pull of 2 GB.")] = False,
) -> None:
    """Measure small pulls beside a large one."""
    nbytes = LARGE_BYTES // 5 if quick else LARGE_BYTES
    config: dict[str, Any] = {"large_bytes": nbytes, "block_bytes": BLOCK_BYTES, "load_before": os.getloadavg()[0]}
    results: list[Result] = []
    for name in only or ["shm", "tcp", "nixl"]:
        results += measure(name, nbytes, level or ["transfer", "store"])
    finish(config, results, json, console)


if __name__ == "__main__":
    typer.run(main)
