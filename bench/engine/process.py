"""Our engine as the bench drives it: through a worker's own iteration loop, without store, router or HTTP.

Told by one JSON command per line, answering with one JSON line; it ends when its input does.
"""

import asyncio
import contextlib
import json
import os
import sys
from array import array
from typing import Any

import uvloop

from bench.common.lines import cpu_s, listen, resident_bytes, say
from tracehaul.engine.base import Guide, SequenceId
from tracehaul.engine.torch_engine import TorchEngine, TorchEngineConfig
from tracehaul.runtime import clock
from tracehaul.wire.steps import Constraint, Sampling
from worker.config import WorkerConfig
from worker.iteration import IterationLoop
from worker.job import Failed, Job, Sampled
from worker.pressure import Arrival
from worker.scheduler import Scheduler

TOKEN = 17
"""What contexts are made of: speed does not depend on sense."""


FORM = Constraint(
    "json_schema",
    json.dumps(
        {
            "type": "array",
            "minItems": 10_000,
            "items": {
                "type": "object",
                "required": ["name", "age", "tags"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string"},
                    "age": {"type": "integer", "minimum": 0},
                    "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
                },
            },
        }
    ),
)
"""Of answers that are held to one: it does not end before a bench does."""


class Driver:
    """One engine and its loop."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        config = WorkerConfig()
        scheduler = Scheduler(config.chunk_tokens, config.sequences_max)
        self._loop = IterationLoop(engine, scheduler, engine.grow)
        self._block = memoryview(bytes(engine.info.layout.block_bytes))
        self._held: dict[int, SequenceId] = {}

    async def run(self) -> None:
        """Iterate for ever; cancel to stop."""
        await self._loop.run()

    async def do(self, command: dict[str, Any]) -> Any:
        """Carry out one command."""
        name = command.pop("do")
        match name:
            case "prefill":
                return await self.prefill(**command)
            case "decode":
                return await self.decode(**command)
            case "serve":
                return await self.serve(**command)
            case "greedy":
                return await self.greedy(**command)
            case "usage":
                return self.usage()
            case _:
                raise AssertionError(name)

    async def prefill(self, tokens: list[int], held: int) -> dict[str, Any]:
        """Seconds until the token after a prompt, whose first ``held`` tokens are there."""
        sequence = await self._hold(held, held + len(tokens) + 1)
        began_s = clock.perf_s()
        job, key = self._start(sequence, [TOKEN] * held + tokens, 1)
        await _token(job)
        took_s = clock.perf_s() - began_s
        await self._end(job, key)
        return {"seconds": took_s}

    async def decode(
        self, contexts: list[int], iterations: int, warm_up: int, structured: bool = False
    ) -> dict[str, Any]:
        """Seconds of that many iterations over sequences of these lengths; ``structured``: held to a JSON schema."""
        samples = warm_up + iterations + 1
        held = [await self._hold(length, length + samples + 1) for length in contexts]
        guides = [await self._engine.guide(FORM, []) if structured else None for _ in contexts]
        jobs = [
            self._start(sequence, [TOKEN] * (length + 1), samples, guide)
            for sequence, length, guide in zip(held, contexts, guides, strict=True)
        ]
        last, _ = jobs[-1]
        for _ in range(warm_up):
            await _token(last)
        began_s = clock.perf_s()
        for _ in range(iterations):
            await _token(last)
        took_s = clock.perf_s() - began_s
        spread = {job.samples for job, _ in jobs}
        for job, key in jobs:
            await self._end(job, key)
        assert len(spread) == 1, "the batch is not in step"
        return {"seconds": took_s}

    async def serve(self, requests: list[tuple[float, list[int], int]]) -> dict[str, Any]:
        """Seconds from the first arrival to the last token of requests ``(arrival, prompt, outputs)``."""
        began_s = clock.perf_s()

        async def one(arrival_s: float, prompt: list[int], outputs: int) -> None:
            await asyncio.sleep(max(0.0, arrival_s - (clock.perf_s() - began_s)))
            job, key = self._start(await self._hold(0, len(prompt) + outputs), prompt, outputs)
            for _ in range(outputs):
                await _token(job)
            await self._end(job, key)

        async with asyncio.TaskGroup() as group:
            for arrival_s, prompt, outputs in requests:
                group.create_task(one(arrival_s, prompt, outputs))
        return {"seconds": clock.perf_s() - began_s}

    async def greedy(self, tokens: list[int], outputs: int) -> dict[str, Any]:
        """What follows a prompt."""
        job, key = self._start(await self._hold(0, len(tokens) + outputs), list(tokens), outputs)
        found = [await _token(job) for _ in range(outputs)]
        await self._end(job, key)
        return {"tokens": found}

    def usage(self) -> dict[str, Any]:
        """What this process has used."""
        return {"cpu_s": cpu_s(), "rss": resident_bytes()}

    async def _hold(self, length: int, capacity: int) -> SequenceId:
        """A sequence that has ``length`` tokens of KV."""
        sequence = self._engine.open(capacity)
        assert sequence is not None, "the bench's contexts do not fit the KV memory"
        block_tokens = self._engine.info.layout.block_tokens
        assert length % block_tokens == 0
        if length:
            await self._engine.unpack(sequence, 0, length, [self._block] * (length // block_tokens))
        return sequence

    def _start(
        self, sequence: SequenceId, tokens: list[int], outputs: int, guide: Guide | None = None
    ) -> tuple[Job, int]:
        job = Job(
            arrival=Arrival(False, sequence),
            came_s=0.0,
            sequence=sequence,
            tokens=array("I", tokens),
            sampling=Sampling(max_tokens=outputs, temperature=0.0),
            emitted=0,
            samples_max=outputs,
            computed=self._engine.length(sequence),
            guide=guide,
        )
        return job, self._loop.start(job)

    async def _end(self, job: Job, key: int) -> None:
        await self._loop.stop(key)
        self._engine.close(job.sequence)


async def _token(job: Job) -> int:
    """Wait for the next token."""
    while True:
        match await job.events.get():
            case Sampled(token, _):
                return token
            case Failed(error):
                raise error
            case _:
                pass


async def main(model: str, kv_tokens: str, threads: str, weights: str | None = None) -> None:
    """Load, say what it took, answer commands until the input ends."""
    config = TorchEngineConfig(
        model=model,
        weights="int8" if weights == "int8" else None,
        device="cpu",
        threads=int(threads),
        kv_tokens_max=int(kv_tokens),
    )
    engine = await TorchEngine.load(config)
    driver = Driver(engine)
    say(driver.usage() | {"kv_bytes": engine.info.kv_tokens_max * engine.info.layout.token_bytes})
    running = asyncio.create_task(driver.run())
    try:
        await listen(driver.do)
    finally:
        running.cancel()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        uvloop.run(main(*sys.argv[1:]))
    sys.stdout.flush()
    os._exit(0)  # the parent wants nothing more
