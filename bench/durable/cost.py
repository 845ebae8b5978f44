"""What the journal costs a whole router: real processes and HTTP, a worker that computes nothing.

Agents take turns, 100 steps a second, streamed; each prompt is the last one, its answer and some more. Routers with and
without a journal answer the same, interleaved. ``journal.cost``: the share of steps a second that is lost; at that rate
a router has time to spare, so ``journal.cost.cpu`` tells by how much the processor's time of a step grows, all threads
of the router, and ``journal.cost.core`` the share of a core. A database's own processes are not in them.
"""

from contextlib import ExitStack
from statistics import median
from typing import Any

from rich.console import Console

from bench.common.report import Result
from bench.router.client import Client, Connection, must
from bench.router.fleet import ANSWER_TOKENS, CONNECTIONS, WORD, Message, Prompts, RouterAlone, router_alone
from tracehaul.model.text import Text
from tracehaul.runtime import clock

PER_S = 100
AGENTS = 40
OPENING_TOKENS, MORE_TOKENS = 900, 120
TURNS = 24
"""Then an agent's trace ends, and another begins."""
PROMPT_TOKENS = 400_000
REST_S = 0.3
WARM_UP_S = 3.0


class Agents:
    """Clients of one router."""

    def __init__(self, fleet: RouterAlone, prompts: Prompts) -> None:
        self.fleet = fleet
        self._prompts = prompts
        self._client: Client = fleet.client(CONNECTIONS)
        self._talks: list[tuple[str, list[Message]]] = [self._talk() for _ in range(AGENTS)]
        self._steps = 0

    def paced(self, seconds: float) -> tuple[float, float]:
        """Steps answered in a second, and the processor's milliseconds of each, at :data:`PER_S` offered."""
        answered, wanted = 0, int(seconds * PER_S)
        before_s, began_s = self.fleet.cpu_s(), clock.perf_s()

        def ended(connection: Connection) -> None:
            nonlocal answered
            must(connection.answer)
            answered += 1

        for at in range(wanted):
            while (left_s := began_s + at / PER_S - clock.perf_s()) > 0:
                self._client.poll(ended, left_s)
            while (free := self._free()) is None:
                self._client.poll(ended)
            self._client.send(free, self._request())
        while answered < wanted:
            self._client.poll(ended)
        took_s = clock.perf_s() - began_s
        ends_s = clock.perf_s() + REST_S  # what the router does once it has answered counts, too
        while clock.perf_s() < ends_s:
            self._client.poll(ended, REST_S)
        return wanted / took_s, (self.fleet.cpu_s() - before_s) / wanted * 1e3

    def _free(self) -> Connection | None:
        return next((connection for connection in self._client.connections if not connection.busy), None)

    def _request(self) -> bytes:
        at = self._steps % AGENTS
        self._steps += 1
        name, messages = self._talks[at]
        request = self.fleet.request(messages, ANSWER_TOKENS, name)
        messages.append({"role": "assistant", "content": WORD * ANSWER_TOKENS})
        messages.append({"role": "user", "content": self._prompts.take(MORE_TOKENS)})
        if len(messages) > 2 * TURNS:
            self._talks[at] = self._talk()
        return request

    def _talk(self) -> tuple[str, list[Message]]:
        name = self.fleet.name()
        return name, self.fleet.opening(name, self._prompts.take(OPENING_TOKENS))


def cost_results(text: Text, postgresql: str, console: Console, *, quick: bool) -> list[Result]:
    """``journal.cost`` of each database."""
    seconds, rounds = (2.0, 2) if quick else (5.0, 8)
    kinds: dict[str, dict[str, Any]] = {"none": {"traces_keep_s": 0.0}, "sqlite": {}}
    if postgresql:
        kinds["postgresql"] = {"database": postgresql, "name": f"bench-{int(clock.wall_s())}"}
    prompts = Prompts(text, PROMPT_TOKENS)
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    spent: dict[str, list[float]] = {kind: [] for kind in kinds}
    with ExitStack() as stack:
        agents = {
            kind: Agents(stack.enter_context(router_alone(text, console, **more)), prompts)
            for kind, more in kinds.items()
        }
        for each in agents.values():
            each.paced(WARM_UP_S)
        for turn in range(rounds):
            for kind in sorted(agents, reverse=bool(turn % 2)):
                per_s, cpu_ms = agents[kind].paced(seconds)
                rates[kind].append(per_s)
                spent[kind].append(cpu_ms)
    rate, cpu_ms = median(rates.pop("none")), median(spent.pop("none"))
    results = [Result("journal.cost.base.rate", rate, "1/s"), Result("journal.cost.base.cpu", cpu_ms, "ms")]
    for kind, found in rates.items():
        more_ms = median(spent[kind]) - cpu_ms
        results += [
            Result(f"journal.cost.{kind}", 1 - median(found) / rate, "1", "journal.cost.base.rate"),
            Result(f"journal.cost.cpu.{kind}", more_ms / cpu_ms, "1", "journal.cost.base.cpu"),
            Result(f"journal.cost.core.{kind}", more_ms * PER_S / 1e3, "share of a core"),
        ]
    return results
