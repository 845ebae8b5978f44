"""The store's data plane against what its bytes cost anyway: memcpy on one host, raw TCP between two.

Batches of 64 MiB in blocks of each size are put to and got from a real node process by one and by two client
processes, checksums on; every round of the store is followed by a round of its baselines in the same processes and
the same memory. On one host each put and get is also repeated without the checksums: what these cost. Then the index:
lookups, memory, what an idle node costs, and what importing the client does.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import Progress

from bench.common.processes import Place, Process, running, together, two_places
from bench.common.report import Result, finish
from bench.store.footprint import footprint
from bench.store.process import BATCH_BYTES, BATCHES

SIZES = {"64K": 64 << 10, "256K": 256 << 10, "1M": 1 << 20, "4M": 4 << 20}
ROUNDS = 15
ROUNDS_QUICK = 4
WARM_UP_ROUNDS = 2
IDLE_S = 20.0
LOOKUP_S = 3.0
EXISTS = 1000
INDEX_BLOCKS = 1_000_000
CLIENTS_MAX = 2
UNSUMMED = 4_000_000
"""Added to the number of a batch that is put without checksums."""
HERE = Place("127.0.0.1")

console = Console()


class Part(StrEnum):
    """What can be measured alone."""

    HOST = "host"
    TCP = "tcp"
    INDEX = "index"
    IDLE = "idle"
    IMPORT = "import"


Rates = dict[tuple[str, str, int], list[float]]
"""GB/s of each round by (what, size, clients)."""


class Others(NamedTuple):
    """The baselines of TCP: a raw peer's address, and a client of Mooncake if there is one."""

    raw: str
    mooncake: Process | None


def one_round(clients: list[Process], batch: int, nbytes: int, others: Others | None) -> Iterator[tuple[str, float]]:
    """Seconds of each operation and of each baseline, alternating."""
    mooncake = [others.mooncake] if others is not None and others.mooncake is not None and len(clients) == 1 else []
    if others is None:
        yield "memcpy", together(clients, do="memcpy", batch=batch)
    else:
        yield "raw.put", together(clients, do="raw", way="put", address=others.raw, batch=batch)
    if mooncake:
        yield "mooncake.put", together(mooncake, way="put", batch=batch, size=nbytes)
    yield "put", together(clients, do="put", batch=batch)
    if others is not None:
        yield "raw.get", together(clients, do="raw", way="get", address=others.raw, batch=batch)
    if mooncake:
        yield "mooncake.get", together(mooncake, way="get", batch=batch, size=nbytes)
    # What was put some rounds ago: by now in nobody's cache.
    yield "get", together(clients, do="get", batch=batch - WARM_UP_ROUNDS)
    if others is None and len(clients) == 1:
        yield "unsummed.put", together(clients, do="unsummed", way="put", batch=UNSUMMED + batch)
        yield "unsummed.get", together(clients, do="unsummed", way="get", batch=batch - 1)


@contextlib.contextmanager
def tcp_others(node_place: Place, client_place: Place, python: str) -> Generator[Others, None, None]:
    """Start the baselines of TCP."""
    with contextlib.ExitStack() as stack:

        def start(place: Place, *words: str, **where: str) -> Process:
            process = Process(place, *words, **where)
            stack.enter_context(running(process))
            return process

        raw = start(node_place, "raw", node_place.host)
        mooncake = None
        if subprocess.run([python, "-c", "import mooncake.store"], check=False, capture_output=True).returncode == 0:
            where = {"module": "bench.store.baselines_mooncake", "python": python}
            master = start(node_place, "serve", node_place.host, **where).hear()
            mooncake = start(client_place, "client", client_place.host, master, **where)
            mooncake.hear()
        else:
            console.print(f"Mooncake is left out: {python} cannot import it")
        yield Others(raw.hear(), mooncake)


def move(
    node_place: Place, client_place: Place, kind: str, rounds: int, others: Others | None, progress: Progress
) -> Rates:
    """Move batches of every size by one and by two clients."""
    rates: Rates = {}
    where = "host" if others is None else "tcp"
    task = progress.add_task(where, total=len(SIZES) * CLIENTS_MAX * rounds)
    clients = [Process(client_place, "client", kind, client_place.host, f"client-{i}") for i in range(CLIENTS_MAX)]
    with running(*clients):
        for client in clients:
            client.hear()
        for size, nbytes in SIZES.items():
            arena_bytes = BATCH_BYTES * (BATCHES + 2) * CLIENTS_MAX
            node = Process(node_place, "node", kind, node_place.host, str(arena_bytes), str(nbytes))
            with running(node):
                info = node.hear()
                for client in clients:
                    client.ask(do="attach", info=info, size=nbytes)
                batch = 0
                for count in range(1, CLIENTS_MAX + 1):
                    for _ in range(WARM_UP_ROUNDS):
                        together(clients, do="put", batch=batch)
                        batch += 1
                    for _ in range(rounds):
                        for what, seconds in one_round(clients[:count], batch, nbytes, others):
                            rates.setdefault((what, size, count), []).append(count * BATCH_BYTES / seconds / 1e9)
                        batch += 1
                        progress.update(task, advance=1, description=f"{where} {size}, {count} client(s)")
    return rates


def results_of(rates: Rates, where: str) -> list[Result]:
    """Medians, each operation against its baselines of the same rounds."""
    medians = {key: median(values) for key, values in rates.items()}
    prefix = "" if where == "host" else "tcp."
    results: list[Result] = []
    for (what, size, count), value in medians.items():
        suffix = size if count == 1 else f"{size}.x{count}"
        if what.startswith("unsummed."):
            way = what.removeprefix("unsummed.")
            cost = 1 - medians[way, size, count] / value
            results.append(Result(f"store.{way}.{where}.{suffix}.unsummed", value, "GB/s"))
            name = f"store.checksum.cost.{way}.{suffix}"
            results.append(Result(name, 100 * cost, "%", f"store.{way}.{where}.{suffix}.unsummed", 1 - cost))
            continue
        if what not in ("put", "get"):
            results.append(Result(f"{prefix}{what}.{suffix}", value, "GB/s"))
            continue
        name = f"store.{what}.{where}.{suffix}"
        first = "memcpy" if where == "host" else f"raw.{what}"
        results.append(Result(name, value, "GB/s", f"{prefix}{first}.{suffix}", value / medians[first, size, count]))
        second = f"mooncake.{what}"
        if (second, size, count) in medians:
            ratio = value / medians[second, size, count]
            results.append(Result(f"{name}.mooncake", value, "GB/s", f"{prefix}{second}.{suffix}", ratio))
    return results


def index(quick: bool) -> list[Result]:
    """Lookups and the memory of the index."""
    node = Process(HERE, "node", "shm", HERE.host, str(BATCH_BYTES * BATCHES), str(SIZES["64K"]))
    client = Process(HERE, "client", "shm", HERE.host, "client-0")
    with console.status("looking up"), running(node, client):
        client.hear()
        client.ask(do="attach", info=node.hear(), size=SIZES["64K"])
        client.ask(do="put", batch=0)
        asked = client.ask(do="exists", count=EXISTS, times=200 if quick else 1000)
        before_s = node.ask()["cpu_s"]
        answered = client.ask(do="lookups", count=EXISTS, seconds=1.0 if quick else LOOKUP_S)
        spent_s = node.ask()["cpu_s"] - before_s
    with console.status("filling an index"):
        alone = Process(HERE, "index", str(INDEX_BLOCKS))
        with running(alone):
            grown = alone.hear()
    rate = answered / spent_s
    return [
        Result("rpc.ping", asked["ping_ms"], "ms"),
        Result("store.exists.1000", asked["exists_ms"], "ms", "rpc.ping", asked["exists_ms"] / asked["ping_ms"]),
        Result("dict.lookups", grown["dict_lookups"], "1/s a core"),
        Result("store.lookups", rate, "1/s a core", "dict.lookups", rate / grown["dict_lookups"]),
        Result("dict.index.1M", grown["dict"], "B"),
        Result("store.index.1M", grown["arena"], "B", "dict.index.1M", grown["arena"] / grown["dict"]),
    ]


def idle(seconds: float) -> list[Result]:
    """CPU of a node that holds blocks and has a client, with nothing to do; per transport."""
    results: list[Result] = []
    for kind in ("shm", "tcp", "nixl"):
        node = Process(HERE, "node", kind, HERE.host, str(BATCH_BYTES * BATCHES), str(SIZES["1M"]))
        client = Process(HERE, "client", kind, HERE.host, "client-0")
        with console.status(f"idling for {seconds:.0f} s ({kind})"), running(node, client):
            client.hear()
            client.ask(do="attach", info=node.hear(), size=SIZES["1M"])
            client.ask(do="put", batch=0)
            asyncio.run(asyncio.sleep(2.0))
            before_s = node.ask()["cpu_s"]
            asyncio.run(asyncio.sleep(seconds))
            percent = 100 * (node.ask()["cpu_s"] - before_s) / seconds
        results.append(Result("store.idle.cpu" if kind == "shm" else f"store.idle.cpu.{kind}", percent, "% of a core"))
    return results


def main(
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    png: Annotated[Path | None, typer.Option(help="Plot the rates there.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer rounds, shorter waits.")] = False,
    only: Annotated[Part | None, typer.Option(help="Measure just that.")] = None,
    mooncake: Annotated[str, typer.Option(help="An interpreter that has Mooncake Store.")] = sys.executable,
    transport: Annotated[str, typer.Option(help="What the store uses between hosts: tcp or nixl.")] = "tcp",
) -> None:
    """Measure one store node and its clients on this machine."""
    rounds = ROUNDS_QUICK if quick else ROUNDS
    config: dict[str, Any] = {"batch_bytes": BATCH_BYTES, "batches": BATCHES, "rounds": rounds, "quick": quick}
    # On a busy machine the threads of a put or get do not run beside each other, and one of memcpy does not care.
    config["load_before"] = os.getloadavg()[0]
    results: list[Result] = []
    with Progress(console=console) as progress:
        if only in (None, Part.HOST):
            results += results_of(move(HERE, HERE, "shm", rounds, None, progress), "host")
        if only in (None, Part.TCP):
            with two_places() as (node_place, client_place, words):
                config |= {"tcp": words, "transport": transport}
                console.print(f"TCP over {words}")
                with tcp_others(node_place, client_place, mooncake) as others:
                    config["mooncake"] = others.mooncake is not None
                    rates = move(node_place, client_place, transport, rounds, others, progress)
                results += results_of(rates, "tcp")
    if only in (None, Part.INDEX):
        results += index(quick)
    if only in (None, Part.IDLE):
        results += idle(IDLE_S / 4 if quick else IDLE_S)
    if only in (None, Part.IMPORT):
        results += footprint(rounds)
    finish(config, results, json, console)
    if png is not None:
        from bench.store.plot import plot  # needs the extra "bench"

        plot(results, png)
        console.print(f"plotted to {png}")


if __name__ == "__main__":
    typer.run(main)
