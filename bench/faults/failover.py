"""What readers notice when a store node dies, or freezes: two replicas, one node gone under a read load.

Two store processes hold pinned traces twice, and others once. Reader processes read without a pause, a whole trace at
a time, every byte verified, while one of the nodes is killed (SIGKILL) or frozen (SIGSTOP) at a random moment. Every
read of every round counts: how many pinned blocks did not come, and how long the slowest read took; of what had its one
copy on the lost node, how soon it is said to be a miss. Then the node comes back empty and is given its copies again.
"""

import asyncio
import random
import signal
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from bench.common.processes import Place, Process, running
from bench.common.report import Result, finish
from bench.faults.failover_process import BLOCK, BLOCKS, GRACE_S, Event, Read, Round
from tracehaul.runtime import clock

NODES = ("store-0", "store-1")
READERS = 2
PINNED = 16
LONE = 8
"""Traces with one copy, half of them on each node."""
ROUNDS = {"kill": 8, "freeze": 3}
ROUNDS_QUICK = {"kill": 1, "freeze": 1}
ROUND_S = 4.0
WARM_UP_S = 0.5
COPIED_TIMEOUT_S = 60.0
HERE = Place("127.0.0.1")
MODULE = "bench.faults.failover_process"

console = Console()


class Bench:
    """The processes, and what they do in a round."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._router = Process(HERE, "router", module=MODULE)
        self._address = self._router.hear()
        self._nodes = {name: self._start(name) for name in NODES}
        self._readers = [Process(HERE, "reader", f"reader-{i}", self._address, module=MODULE) for i in range(READERS)]
        for reader in self._readers:
            reader.hear()
        self._pinned = [f"pinned-{i}" for i in range(PINNED)]
        self._lone = [f"lone-{i}" for i in range(LONE)]

    def _start(self, name: str) -> Process:
        process = Process(HERE, "node", name, self._address, module=MODULE)
        process.hear()
        return process

    def processes(self) -> list[Process]:
        """All that must be ended."""
        return [*self._readers, *self._nodes.values(), self._router]

    def fill(self) -> None:
        """Write what is read."""
        sleep(2 * GRACE_S)
        for i, trace in enumerate(self._pinned):
            self._readers[0].ask(do="write", trace=trace, home=NODES[i % 2], replicas=2)
        self._wait_for_copies()

    def round(self, event: Event) -> Round:
        """Read, and let ``event`` happen meanwhile; everything is as before when it returns."""
        for i, trace in enumerate(self._lone):
            self._readers[0].ask(do="write", trace=trace, home=NODES[i % 2], replicas=1)
        name = self._dice.choice(NODES)
        node = self._nodes[name]
        for reader in self._readers:  # a client's first read maps the arenas
            reader.tell(do="read", seconds=WARM_UP_S, traces=self._pinned, lone=self._lone)
        for reader in self._readers:
            reader.hear()
        for reader in self._readers:
            reader.tell(do="read", seconds=ROUND_S, traces=self._pinned, lone=self._lone)
        sleep(self._dice.uniform(0.2, 0.5) * ROUND_S)
        at_s = clock.perf_s()
        node.send(signal.SIGKILL if event is Event.KILL else signal.SIGSTOP)
        reads: list[list[Read]] = [[tuple(read) for read in reader.hear()] for reader in self._readers]
        if event is Event.FREEZE:
            node.send(signal.SIGCONT)
            sleep(2 * GRACE_S)
            return Round(event, at_s, reads, 0.0)
        node.end()
        self._nodes[name] = self._start(name)
        back_s = clock.perf_s()
        self._wait_for_copies()
        return Round(event, at_s, reads, clock.perf_s() - back_s)

    def _wait_for_copies(self) -> None:
        end_s = clock.perf_s() + COPIED_TIMEOUT_S
        while self._readers[0].ask(do="copies", traces=self._pinned) != [PINNED * BLOCKS] * len(NODES):
            if clock.perf_s() > end_s:
                raise RuntimeError("the copies were not made")
            sleep(0.05)


def sleep(seconds: float) -> None:
    """Wait."""
    asyncio.run(asyncio.sleep(seconds))


def results_of(rounds: list[Round]) -> list[Result]:
    """Over all reads of all rounds."""
    results: list[Result] = []
    for event, prefix in ((Event.KILL, "store.failover"), (Event.FREEZE, "store.failover.frozen")):
        of = [part for part in rounds if part.event is event]
        if not of:
            continue
        pinned = [read for part in of for reads in part.readers for read in reads if read[3] == "pinned"]
        misses = [read for part in of for reads in part.readers for read in reads if read[3] == "lone" and read[2]]
        usual_ms = 1e3 * median([seconds for _, seconds, _, _ in pinned])
        slowest_ms = 1e3 * max(seconds for _, seconds, _, _ in pinned)
        results.append(Result(f"{prefix}.read", usual_ms, "ms"))
        results.append(Result(f"{prefix}.slowest", slowest_ms, "ms", f"{prefix}.read", slowest_ms / usual_ms))
        results.append(Result(f"{prefix}.reads", len(pinned), "reads"))
        results.append(Result(f"{prefix}.failed", sum(read[2] > 0 for read in pinned), "reads"))
        if misses:
            results.append(Result(f"{prefix}.miss", 1e3 * median([read[1] for read in misses]), "ms"))
            results.append(Result(f"{prefix}.miss.slowest", 1e3 * max(read[1] for read in misses), "ms"))
        if event is Event.KILL:
            results.append(Result(f"{prefix}.rebuild", median([part.rebuilt_s for part in of]), "s"))
    return results


def main(
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    png: Annotated[Path | None, typer.Option(help="Plot the reads over time there.")] = None,
    quick: Annotated[bool, typer.Option(help="One round of each kind.")] = False,
    seed: Annotated[int, typer.Option(help="Of the moments, and of which node it is.")] = 0,
) -> None:
    """Measure what readers notice of a lost store node."""
    counts = ROUNDS_QUICK if quick else ROUNDS
    config: dict[str, Any] = {
        "seed": seed,
        "rounds": counts,
        "round_s": ROUND_S,
        "readers": READERS,
        "block_bytes": BLOCK,
        "blocks_a_read": BLOCKS,
        "pinned_traces": PINNED,
        "lone_traces": LONE,
        "grace_s": GRACE_S,
    }
    bench = Bench(seed)
    rounds: list[Round] = []
    with Progress(console=console) as progress:
        task = progress.add_task("filling", total=sum(counts.values()))
        try:
            bench.fill()
            for event in Event:
                for _ in range(counts[event]):
                    progress.update(task, description=event)
                    rounds.append(bench.round(event))
                    progress.advance(task)
        finally:
            with running(*bench.processes()):
                pass
    finish(config, results_of(rounds), json, console)
    if png is not None:
        from bench.faults.failover_plot import plot  # needs the extra "bench"

        plot(rounds, png)
        console.print(f"plotted to {png}")


if __name__ == "__main__":
    typer.run(main)
