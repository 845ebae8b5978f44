"""A batch whose router, database and workers are killed as it runs.

``batch.again``: output tokens sampled more than once, as a share of those answered, over kills of the router at random
moments, of PostgreSQL and of every worker once; each line must be answered exactly once. Real processes, whose engines
compute nothing and take their time. What a worker had sampled by its death is read just before.
"""

import asyncio
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx
from rich.console import Console

from bench.common.postgres import found, postgres
from bench.common.report import Result
from bench.durable.batches import LOOK_S, OVER, Batch, line, sleep
from bench.durable.killed import WORKERS, Routers, routers
from tracehaul.model.source import resolve
from tracehaul.runtime import clock

LINES, LINES_QUICK = 2_000, 200
KILLS, KILLS_QUICK = 50, 4
ANSWER_TOKENS = 16


class _Killing:
    """What is killed, when, and what had been sampled by then."""

    def __init__(self, cluster: Routers, kills: int) -> None:
        self._cluster = cluster
        self._dice = random.Random(1)
        self._router = cluster.names[0]
        self.order = [self._router] * kills
        for name in (*WORKERS, "store-0", "postgresql"):
            self.order.insert(self._dice.randrange(len(self.order)), name)
        self.sampled = 0
        """By workers that are gone."""
        self.done: list[str] = []

    def next(self, database: Callable[[], None]) -> None:
        """Kill one, at a moment that nobody chose."""
        name = self.order[len(self.done)]
        self.done.append(name)
        sleep(self._dice.uniform(0.0, 0.5))
        if name == "postgresql":
            database()
            return
        if name in WORKERS:
            self.sampled += asyncio.run(self._cluster.sampled(name))
        self._cluster.kill(name)


def kills_results(console: Console, *, quick: bool) -> list[Result]:
    """``batch.again``. Raises NoPostgres."""
    lines, count = (LINES_QUICK, KILLS_QUICK) if quick else (LINES, KILLS)
    with (
        postgres(found()) as server,
        tempfile.TemporaryDirectory(prefix="tracehaul-bench-") as folder,
        routers(Path(folder), 1, server.create("kills")) as cluster,
    ):
        asyncio.run(cluster.ready())
        path = Path(folder) / "calls.jsonl"
        model, more = resolve().name, {"max_tokens": ANSWER_TOKENS, "ignore_eos": True}
        path.write_bytes(b"".join(line(model, at, f"Say {at}.", **more) for at in range(lines)))
        batch, killing = Batch(httpx.URL(cluster.urls[0]).port or 0, path), _Killing(cluster, count)
        began_s = clock.perf_s()

        def database() -> None:
            server.kill()
            sleep(1.0)
            server.start()

        while (now := batch.now(cluster.mend))["status"] not in OVER:
            done = sum(now["request_counts"][kind] for kind in ("completed", "failed"))
            if len(killing.done) < len(killing.order) and done >= lines * len(killing.done) // (len(killing.order) + 1):
                killing.next(database)
            sleep(LOOK_S)
        took_s = clock.perf_s() - began_s
        assert now["status"] == "completed", now
        answered = batch.lines(now["output_file_id"])
        names = [each["custom_id"] for each in answered]
        assert sorted(names) == sorted(f"line-{at}" for at in range(lines)), "not each was answered once"
        assert not batch.lines(now["error_file_id"])
        tokens = sum(each["response"]["body"]["usage"]["completion_tokens"] for each in answered)
        said = killing.sampled + asyncio.run(cluster.sampled())
    console.print(f"killed: {' '.join(killing.done)}", highlight=False)
    return [
        Result("batch.again", said / tokens - 1, "1"),
        Result("batch.again.tokens", said - tokens, "tokens"),
        Result("batch.kills", len(killing.done), "kills"),
        Result("batch.killed", lines / took_s, "lines/s"),
    ]
