"""Agents whose answers' every token is timed, at routers whose databases fail."""

import asyncio
import json
from itertools import pairwise
from typing import Any

import httpx

from tracehaul.runtime import clock

TOKENS = 24
PAUSE_S = 0.1
CALL_S = 60.0


class Agent:
    """One trace. Raises AssertionError where a step fails."""

    def __init__(self, url: str, name: str) -> None:
        self.url = url
        self.name = name
        self.steps = 0
        self.first_s: list[float] = []
        """Of each step, until its first token came."""
        self.gaps_s: list[float] = []
        """The longest between two tokens of each."""
        self._messages: list[dict[str, str]] = [{"role": "user", "content": f"Tell {name} of gravity. " * 60}]

    async def step(self, http: httpx.AsyncClient) -> None:
        """The next one."""
        body: dict[str, Any] = {"messages": self._messages, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        said, times = "", [clock.perf_s()]
        headers = {"X-Trace-Id": self.name}
        async with http.stream("POST", f"{self.url}/v1/chat/completions", json=body, headers=headers) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    said += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                    times.append(clock.perf_s())
        self.first_s.append(times[1] - times[0])
        self.gaps_s.append(max((b - a for a, b in pairwise(times[1:])), default=0.0))
        self._messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And more? " * 20}]
        self.steps += 1

    async def run(self, http: httpx.AsyncClient, until_s: float) -> None:
        while clock.perf_s() < until_s:
            await self.step(http)
            await asyncio.sleep(PAUSE_S)


def work(agents: list[Agent], seconds: float) -> None:
    """All of them take steps for so long."""

    async def main() -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=CALL_S) as http, asyncio.TaskGroup() as group:
            for agent in agents:
                group.create_task(agent.run(http, clock.perf_s() + seconds))

    asyncio.run(main())


def gauge(url: str, name: str) -> float:
    """As a router tells it."""
    page = httpx.get(f"{url}/metrics", trust_env=False, timeout=CALL_S).text
    return float(next(line for line in page.splitlines() if line.startswith(f"{name} ")).split()[1])


def steps(url: str, name: str) -> int:
    """Of a trace, as a router knows it."""
    return httpx.get(f"{url}/v1/traces/{name}", trust_env=False, timeout=CALL_S).json()["steps_count"]
