"""Live traces whose routers are killed again and again: what their clients see of it.

Twelve recorded agents: their openings and what their tools said (cut short), with the answers that they are given here,
streamed; fake engines, real processes. A client whose call fails dials until somebody listens, at the other address if
there is one, and asks once more. ``journal.hits.one``: one router, killed every twenty seconds and started again;
``.two``: two over one PostgreSQL, killed in turns. Each is the share of prompt tokens that was cached, divided by that
of the same steps of the same agents undisturbed. ``.failed``: steps that failed twice. ``.again``: tokens that the
engines sampled beyond those that were answered. ``.back`` and ``.back.worst``: seconds from a kill to the next answer's
end, median and worst.
"""

import asyncio
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import msgspec
from rich.console import Console

from bench.common.recordings import Trajectory, trajectories
from bench.common.report import Result
from bench.durable.killed import Routers, routers
from tracehaul.runtime import clock

AGENTS = 12
OPENING_CHARACTERS, MORE_CHARACTERS = 6000, 900
ANSWER_TOKENS = 40
GAP_S = 1.5
EVERY_S = 20.0
FULL_S, QUICK_S = 180.0, 45.0
DIAL_S = 60.0
CALL_S = 120.0


class Seen(msgspec.Struct):
    """What the clients of a run saw."""

    steps: int = 0
    failed: int = 0
    retried: int = 0
    output_tokens: int = 0
    cached: dict[str, tuple[int, int]] = {}
    """Of each answered step, tokens of its prompt that were cached, and all."""
    ended_s: list[float] = []
    why: list[str] = []

    def share(self, steps: Iterable[str]) -> float:
        """Of these steps' prompts, what was cached."""
        found = [self.cached[step] for step in steps]
        return sum(cached for cached, _ in found) / max(1, sum(tokens for _, tokens in found))


class Agent:
    """One client with its trace."""

    def __init__(
        self, recorded: Trajectory, number: int, cluster: Routers, http: httpx.AsyncClient, seen: Seen
    ) -> None:
        self._more = [m["content"][:MORE_CHARACTERS] for m in recorded.messages if m["role"] != "assistant"][2:]
        self._messages = [
            {"role": m["role"], "content": m["content"][:OPENING_CHARACTERS]} for m in recorded.messages[:2]
        ]
        self._number = number
        self._urls = cluster.urls
        self._at = number % len(cluster.urls)
        self._http = http
        self._seen = seen

    async def run(self, until_s: float) -> None:
        """Steps, one after the other, until then."""
        await asyncio.sleep(GAP_S * self._number / AGENTS)
        step = 0
        while clock.perf_s() < until_s:
            answer = await self._step(step)
            self._messages.append({"role": "assistant", "content": answer})
            self._messages.append({"role": "user", "content": self._more[step % len(self._more)] or "Go on."})
            step += 1
            await asyncio.sleep(GAP_S)

    async def _step(self, step: int) -> str:
        self._seen.steps += 1
        key = f"agent-{self._number}-{step}"
        try:
            return await self._call(key)
        except (httpx.HTTPError, RuntimeError, ValueError):
            self._seen.retried += 1
        try:
            await self._dial()
            return await self._call(key)
        except (httpx.HTTPError, RuntimeError, ValueError, TimeoutError) as error:
            self._seen.failed += 1
            self._seen.why.append(f"{key}: {error or type(error).__name__}"[:300])
            return "(nothing)"

    async def _dial(self) -> None:
        async with asyncio.timeout(DIAL_S):
            while True:
                self._at = (self._at + 1) % len(self._urls)
                try:
                    answer = await self._http.get(f"{self._urls[self._at]}/health", timeout=5.0)
                    if answer.status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(0.1)

    async def _call(self, key: str) -> str:
        body: dict[str, Any] = {"messages": self._messages, "max_tokens": ANSWER_TOKENS, "temperature": 0.7}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "min_tokens": 1}
        headers = {"X-Trace-Id": f"agent-{self._number}", "Idempotency-Key": key}
        url, text, usage, ended = f"{self._urls[self._at]}/v1/chat/completions", "", dict[str, Any](), False
        async with self._http.stream("POST", url, json=body, headers=headers, timeout=CALL_S) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code} {(await answer.aread()).decode()[:200]}")
            async for line in answer.aiter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    ended = True
                elif data.startswith("{"):
                    event = json.loads(data)
                    if "error" in event:
                        raise RuntimeError(str(event["error"])[:200])
                    text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                    usage = event.get("usage") or usage
        if not ended or not usage:
            raise RuntimeError("cut off")
        self._seen.cached[key] = usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]
        self._seen.output_tokens += usage["completion_tokens"]
        self._seen.ended_s.append(clock.perf_s())
        return text


async def lived(agents: Sequence[Trajectory], cluster: Routers, seconds: float, *, kills: bool) -> tuple[Seen, Any]:
    """A run; and when routers were killed, and how many tokens were sampled beyond those answered."""
    await cluster.ready()
    seen, killed, began_s = Seen(), list[float](), clock.perf_s()
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(trust_env=False, limits=limits) as http, asyncio.TaskGroup() as group:
        before = await cluster.sampled()
        working = [
            group.create_task(Agent(one, number, cluster, http, seen).run(began_s + seconds))
            for number, one in enumerate(agents)
        ]
        next_s, turn = began_s + EVERY_S, 0
        while not all(task.done() for task in working):
            if kills and clock.perf_s() > next_s and clock.perf_s() < began_s + seconds:
                cluster.kill(cluster.names[turn % len(cluster.names)])
                killed.append(clock.perf_s())
                next_s, turn = next_s + EVERY_S, turn + 1
            cluster.mend()
            await asyncio.sleep(0.05)
    return seen, (killed, await cluster.sampled() - before - seen.output_tokens)


def hits_results(recordings: Path, postgresql: str, console: Console, *, quick: bool) -> list[Result]:
    """``journal.hits`` of each kind."""
    agents = trajectories(recordings)[:AGENTS]
    seconds = QUICK_S if quick else FULL_S
    kinds = [("undisturbed", 1, ""), ("one", 1, ""), *([("two", 2, postgresql)] if postgresql else [])]
    results: list[Result] = []
    calm = Seen()
    for kind, count, database in kinds:
        kills = kind != "undisturbed"
        with (
            tempfile.TemporaryDirectory(prefix="tracehaul-bench-") as folder,
            routers(Path(folder), count, database) as cluster,
        ):
            seen, (killed, again) = asyncio.run(lived(agents, cluster, seconds, kills=kills))
        name = f"journal.hits.{kind}"
        console.print(f"{kind}: {seen.steps} steps, {seen.retried} asked again", *seen.why, highlight=False)
        results += [
            Result(f"{name}.steps", seen.steps, "steps"),
            Result(f"{name}.failed", seen.failed, "steps"),
            Result(f"{name}.again", again, "tokens"),
        ]
        if not kills:
            calm = seen
            results.append(Result(f"{name}.share", calm.share(calm.cached), "1"))
            continue
        both = sorted(seen.cached.keys() & calm.cached.keys())
        base, share = calm.share(both), seen.share(both)
        back = [min(ended - at for ended in seen.ended_s if ended > at) for at in killed if seen.ended_s[-1] > at]
        results += [
            Result(name, share / base, "1", f"{name}.undisturbed", share / base),
            Result(f"{name}.share", share, "1"),
            Result(f"{name}.undisturbed", base, "1"),
            Result(f"{name}.compared", len(both), "steps"),
            Result(f"{name}.kills", len(killed), "kills"),
            Result(f"{name}.retried", seen.retried, "steps"),
            Result(f"{name}.back", median(back), "s"),
            Result(f"{name}.back.worst", max(back), "s"),
        ]
    return results
