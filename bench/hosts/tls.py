"""What TLS costs: pulls and pushes of KV, and pings of the control plane, with certificates beside plain.

Two pairs of processes, one plain and one with certificates of a CA made for it, do the same in turns.
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


class _Pair:
    """Two processes, and what came of each round."""

    def __init__(self, owner: Place, reader: Place, secrets: Path | None) -> None:
        self.ends = tuple(
            Process(place, place.host, str(secrets / name) if secrets else "", module=MODULE)
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
        plain, tls = _Pair(owner, reader, None), _Pair(owner, reader, secrets)
        with running(*plain.ends, *tls.ends):
            plain.begin()
            tls.begin()
            for number in range(rounds + WARM_UP_ROUNDS):
                for pair in (plain, tls) if number % 2 else (tls, plain):
                    pair.round(count=number >= WARM_UP_ROUNDS)
    results: list[Result] = []
    for way in ("get", "put"):
        values = [BATCH_BYTES / median(pair.seconds[way]) / 1e9 for pair in (plain, tls)]
        costs = [median(pair.cpu_s[way]) / BATCH_BYTES * 1e9 for pair in (plain, tls)]
        results += _beside(f"hosts.{way}", values, "GB/s") + _beside(f"hosts.{way}.cpu", costs, "s/GB, both ends")
    results += _beside("hosts.ping", [median(pair.seconds["ping"]) / PINGS * 1e6 for pair in (plain, tls)], "us")
    return results, words


def _beside(name: str, values: list[float], unit: str) -> list[Result]:
    plain, tls = values
    stem, _, rest = name.removeprefix("hosts.").partition(".")
    named = f"hosts.tls.{stem}" + (f".{rest}" if rest else "")
    return [Result(f"{name}.plain", plain, unit), Result(named, tls, unit, f"{name}.plain", tls / plain)]
