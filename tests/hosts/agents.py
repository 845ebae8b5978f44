"""A program: agents at work on a fleet until standard input ends; what they saw, as JSON.

Each agent runs traces: every prompt is the last one, its answer, and a little more. An endpoint that cannot be reached
is left for the next one, as a client with several addresses does; any other error is a failed request.
"""

import json
import random
import sys
import threading
import time  # noqa: TID251 - of another process than a node
from typing import Any

import httpx

WORDS = 49_000
FIRST_TOKENS, MORE_TOKENS, ANSWER_TOKENS, TRACE_TOKENS = 160, 24, 12, 700
PATIENCE_S = 60.0


class Agent:
    """One trace after the other."""

    def __init__(self, number: int, urls: list[str], model: str, ending: threading.Event) -> None:
        self.random = random.Random(number)
        self.number, self.urls, self.model, self.ending = number, urls, model, ending
        self.steps, self.switched = 0, 0
        self.failed: list[str] = []
        self.cached = 0
        self.slowest_s = 0.0

    def run(self) -> None:
        clients = [httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) for url in self.urls]
        trace = 0
        while not self.ending.is_set():
            trace += 1
            prompt = [self.random.randrange(100, WORDS) for _ in range(FIRST_TOKENS)]
            while len(prompt) < TRACE_TOKENS and not self.ending.is_set():
                began_s = time.monotonic()
                answer = self.step(clients, f"agent-{self.number}-{trace}", prompt)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
                if answer is None:
                    break
                self.steps += 1
                prompt += answer + [self.random.randrange(100, WORDS) for _ in range(MORE_TOKENS)]

    def step(self, clients: list[httpx.Client], trace: str, prompt: list[int]) -> list[int] | None:
        body = {"model": self.model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        body |= {"return_token_ids": True, "ignore_eos": True}
        end_s = time.monotonic() + PATIENCE_S
        at = 0
        while True:
            try:
                answer = clients[at].post("/v1/completions", json=body, headers={"X-Trace-Id": trace})
            except httpx.TransportError as error:
                if time.monotonic() > end_s or len(clients) == 1:
                    self.failed.append(f"{trace}: {type(error).__name__} {error}")
                    return None
                self.switched += 1
                at = (at + 1) % len(clients)
                time.sleep(0.2)
                continue
            if answer.status_code != 200:
                self.failed.append(f"{trace}: {answer.status_code} {answer.text[:300]}")
                return None
            told: dict[str, Any] = answer.json()
            tokens = told["choices"][0]["token_ids"]
            if len(tokens) != ANSWER_TOKENS:
                self.failed.append(f"{trace}: {len(tokens)} tokens, {told['choices'][0]['finish_reason']}")
                return None
            self.cached += told["usage"]["prompt_tokens_details"]["cached_tokens"]
            return tokens


def main() -> None:
    count, model, *urls = sys.argv[1:]
    ending = threading.Event()
    agents = [
        Agent(number, urls[number % len(urls) :] + urls[: number % len(urls)], model, ending)
        for number in range(int(count))
    ]
    threads = [threading.Thread(target=agent.run) for agent in agents]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    ending.set()
    for thread in threads:
        thread.join()
    told = {
        "steps": sum(agent.steps for agent in agents),
        "switched": sum(agent.switched for agent in agents),
        "cached": sum(agent.cached for agent in agents),
        "slowest_s": max(agent.slowest_s for agent in agents),
        "failed": [line for agent in agents for line in agent.failed],
    }
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
