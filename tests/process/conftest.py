"""What tests of whole clusters share: a cluster for each module, and one engine alone to compare it with."""

import asyncio
from collections.abc import Callable, Generator, Sequence

import msgspec
import pytest
from rich.console import Console

from bench.common.fleet import Fleet
from cluster.config import ClusterConfig
from cluster.launch import down, up
from cluster.rundir import RunDir
from tracehaul.engine.base import Work
from tracehaul.wire.steps import Sampling

CONTEXT_TOKENS = 2048
CHUNK_TOKENS = 256


@pytest.fixture(scope="module")
def cluster(config: ClusterConfig, tmp_path_factory: pytest.TempPathFactory) -> Generator[Fleet, None, None]:
    """The cluster that the module's fixture ``config`` describes; its logs stay in pytest's temporary folder.

    A node that a test kills stays dead.
    """
    config = msgspec.structs.replace(config, restart="never")
    run = RunDir(tmp_path_factory.mktemp("cluster"))
    console = Console(quiet=True)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("UCX_TLS", "tcp")
        model = up(config, run, console)[0]
    fleet = Fleet(config, run, model, console)
    try:
        yield fleet
    finally:
        fleet.close()
        down(run)


@pytest.fixture(scope="session")
def alone() -> Generator[Callable[[Sequence[int], Sampling], list[int]], None, None]:
    """What one engine without any cluster answers to a prompt. A prompt that continues the last one extends it."""
    from tracehaul.engine.torch_engine import TorchEngine, TorchEngineConfig  # importing torch takes seconds

    known: dict[tuple[tuple[int, ...], Sampling], list[int]] = {}
    held: list[int] = []

    with asyncio.Runner() as runner:
        engine = runner.run(TorchEngine.load(TorchEngineConfig(dtype="float32", kv_tokens_max=CONTEXT_TOKENS)))
        sequence = engine.open(CONTEXT_TOKENS)
        assert sequence is not None

        async def extend(tokens: Sequence[int], sampling: Sampling | None, emitted: int = 0) -> int | None:
            held.extend(tokens)
            (result,) = await engine.run([Work(sequence, tokens, sampling, emitted)])
            return result.token

        async def generate(prompt: Sequence[int], sampling: Sampling) -> list[int]:
            shared = next((i for i, (a, b) in enumerate(zip(held, prompt[:-1], strict=False)) if a != b), None)
            shared = min(len(held), len(prompt) - 1) if shared is None else shared
            engine.truncate(sequence, shared)
            del held[shared:]
            for start in range(shared, len(prompt) - 1, CHUNK_TOKENS):
                await extend(prompt[start : min(start + CHUNK_TOKENS, len(prompt) - 1)], None)
            output = [prompt[-1]]
            for emitted in range(sampling.max_tokens):
                token = await extend(output[-1:], sampling, emitted)
                assert token is not None
                output.append(token)
            return output[1:]

        def answer(prompt: Sequence[int], sampling: Sampling) -> list[int]:
            key = (tuple(prompt), sampling)
            if key not in known:
                known[key] = runner.run(generate(prompt, sampling))
            return known[key]

        yield answer
        runner.run(engine.aclose())
