"""What a router holds of traces, and what stays of that."""

from collections.abc import Sequence

from bench.common.report import Result
from bench.router.client import Answer, Client, must
from bench.router.fleet import ANSWER_TOKENS, CONNECTIONS, WORD, Message, Prompts, RouterAlone, http

RSS_STEPS = 20
RSS_FIRST_TOKENS = 3000
RSS_STEP_TOKENS = 33
SETTLE_S = 15.0
"""Until a router has forgotten what it expected of prompts that nobody asks for."""


def rss(fleet: RouterAlone, prompts: Prompts, traces: int) -> list[Result]:
    """Traces of 20 steps, the last of 4k tokens, all through HTTP with the router's default limits; then their end."""
    fleet.pin()
    client = fleet.client(CONNECTIONS)
    walk(fleet, client, prompts, 50)
    before_mb = fleet.rss_mb()
    cpu_s = fleet.cpu_s()
    names = walk(fleet, client, prompts, traces, delete=False)
    cpu_s = fleet.cpu_s() - cpu_s
    held_mb = fleet.rss_mb()
    forget(client, names)
    client.poll(timeout_s=SETTLE_S)
    left_mb = fleet.rss_mb()
    return [
        Result("router.rss.before", before_mb, "MB"),
        Result("router.rss", held_mb, "MB", "router.rss.before", held_mb / before_mb),
        Result("router.rss.deleted", left_mb, "MB", "router.rss.before", left_mb / before_mb),
        Result("router.cpu.4k.warm", cpu_s / (len(names) * RSS_STEPS) * 1e3, "ms"),
    ]


def walk(fleet: RouterAlone, client: Client, prompts: Prompts, traces: int, *, delete: bool = True) -> list[str]:
    """So many traces, each from its first step to its last; returns their names."""
    names: list[str] = []
    places = [("", list[Message]()) for _ in client.connections]
    steps = [RSS_STEPS] * len(places)

    def following(at: int, last: Answer | None) -> bytes | None:
        if last is not None:
            must(last)
        if steps[at] == RSS_STEPS:
            if len(names) == traces:
                return None
            steps[at] = 0
            names.append(fleet.name())
            places[at] = names[-1], fleet.opening(names[-1], prompts.take(RSS_FIRST_TOKENS))
        name, messages = places[at]
        if steps[at]:
            messages.append({"role": "assistant", "content": WORD * ANSWER_TOKENS})
            messages.append({"role": "user", "content": prompts.take(RSS_STEP_TOKENS)})
        steps[at] += 1
        return fleet.request(messages, ANSWER_TOKENS, name)

    client.each(following)
    if delete:
        forget(client, names)
    return names


def forget(client: Client, names: Sequence[str]) -> None:
    """Delete traces."""
    left = list(names)

    def following(_: int, last: Answer | None) -> bytes | None:
        if last is not None and last.status != 200:
            raise RuntimeError(f"a trace was not deleted: {last.body!r}")
        return http("DELETE", f"/v1/traces/{left.pop()}") if left else None

    client.each(following)
    client.poll(timeout_s=1.0)
