"""A storm of joins, and the heartbeats after it: real memberships over TCP against a registry in its own process."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from bench.common.processes import Place, Process, running
from bench.common.report import Result

MODULE = "bench.hosts.fleet_process"
HERE = Place("127.0.0.1")
REST_S = 3.0
"""From the end of the storm to the first heartbeat that counts."""


@contextmanager
def fleet(nodes: int, processes: int) -> Generator[tuple[Process, Sequence[Process]], None, None]:
    """A router, and processes that are to be ``nodes`` together."""
    router = Process(HERE, "router", module=MODULE)
    with running(router):
        address = str(router.hear())
        edges = [nodes * number // processes for number in range(processes + 1)]
        parts = [
            Process(HERE, "nodes", address, str(first), str(end - first), str(nodes), module=MODULE)
            for first, end in pairwise(edges)
        ]
        with running(*parts):
            for part in parts:
                part.hear()
            yield router, parts


def measure(nodes: int, processes: int, for_s: float) -> list[Result]:
    """``hosts.join.N``: seconds from the first join to the last node that knows everybody whom it needs.
    ``hosts.heartbeat.N``: the router's processor time in a second, for all heartbeats. Below each, what it takes."""
    with fleet(nodes, processes) as (router, parts):
        _, began_s, cpu_before_s = router.ask(wait_s=0.0)
        for part in parts:
            part.tell(do="join")
        nodes_cpu_s = sum(part.hear() for part in parts)
        members, ended_s, cpu_after_s = router.ask(wait_s=0.0)
        assert members == nodes, members
        _, from_s, cpu_from_s = router.ask(wait_s=REST_S)
        members, until_s, cpu_until_s = router.ask(wait_s=for_s)
        assert members == nodes, members
    return [
        Result(f"hosts.join.{nodes}", ended_s - began_s, "s"),
        Result(f"hosts.join.{nodes}.router_cpu", cpu_after_s - cpu_before_s, "s"),
        Result(f"hosts.join.{nodes}.nodes_cpu", nodes_cpu_s, "s"),
        Result(f"hosts.heartbeat.{nodes}", (cpu_until_s - cpu_from_s) / (until_s - from_s), "cores"),
    ]
