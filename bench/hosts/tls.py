"""What certificates cost: pulls and pushes of KV, proven alone and under TLS, and pings, each beside plain.

Three pairs of processes do the same in turns: one plain, two with certificates of a CA made for them.
"""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench.common.processes import Place, Process, running, two_places
from bench.common.report import Result
from cluster.security.ca import ensure_ca, issue
from cluster.security.laying import lay
from tracehaul.runtime import clock

BLOCK_BYTES = 1 << 20
BATCH_BYTES = 64 * BLOCK_BYTES
PINGS = 1000
ROUNDS = 30
WARM_UP_ROUNDS = 2
MODULE = "bench.hosts.tls_process"
WAYS = ("plain", "auth", "tls")
"""As ``[security] data`` has them."""


class _Pair:
    """Two processes, and what came of each round."""

    def __init__(self, owner: Place, reader: Place, data: str, secrets: Path | None) -> None:
        self.ends = tuple(
            Process(place, place.host, data, str(secrets / name) if secrets else "", module=MODULE)
            for name, place in (("owner", owner), ("reader", reader))
        )
        self.seconds: dict[str, list[float]] = {}
        self.cpu_s: dict[str, list[float]] = {}
        self._told: dict[str, Any] = {}

    def begin(self) -> None:
        """Wait for both."""
        self._told, _ = (end.hear() for end in self.ends)

    def round(self, count: bool) -> None:
        """Each operation once."""
        for way in ("get", "put", "ping"):
            before_s = self._spent_s()
            seconds = self.ends[1].ask(do=way, **self._told)["seconds"]
            if count:
                self.seconds.setdefault(way, []).append(seconds)
                self.cpu_s.setdefault(way, []).append(self._spent_s() - before_s)

    def _spent_s(self) -> float:
        return sum(end.ask(do="nothing")["cpu_s"] for end in self.ends)


def measure(rounds: int = ROUNDS) -> tuple[list[Result], str]:
    """The results, and between what they were measured."""
    with tempfile.TemporaryDirectory() as folder, two_places() as (owner, reader, words):
        secrets = Path(folder)
        ensure_ca(secrets / "authority", "bench", now_s=clock.wall_s())
        for name, place in (("owner", owner), ("reader", reader)):
            lay(secrets / name, issue(secrets / "authority", name, [place.host], now_s=clock.wall_s()))
        pairs = {data: _Pair(owner, reader, data, None if data == "plain" else secrets) for data in WAYS}
        with running(*(end for pair in pairs.values() for end in pair.ends)):
            for pair in pairs.values():
                pair.begin()
            for number in range(rounds + WARM_UP_ROUNDS):
                turned = list(pairs.values())[:: 1 if number % 2 else -1]
                for pair in turned:
                    pair.round(count=number >= WARM_UP_ROUNDS)
    results: list[Result] = []
    for way in ("get", "put"):
        values = {data: BATCH_BYTES / median(pair.seconds[way]) / 1e9 for data, pair in pairs.items()}
        costs = {data: median(pair.cpu_s[way]) / BATCH_BYTES * 1e9 for data, pair in pairs.items()}
        results += _beside(way, values, "GB/s") + _beside(f"{way}.cpu", costs, "s/GB, both ends")
    pings = {data: median(pair.seconds["ping"]) / PINGS * 1e6 for data, pair in pairs.items() if data != "auth"}
    return results + _beside("ping", pings, "us"), words


def _beside(name: str, values: dict[str, float], unit: str) -> list[Result]:
    plain = values["plain"]
    first = f"hosts.{name}.plain"
    others = [(data, value) for data, value in values.items() if data != "plain"]
    beside = [Result(f"hosts.{data}.{name}", value, unit, first, value / plain) for data, value in others]
    return [Result(first, plain, unit), *beside]
