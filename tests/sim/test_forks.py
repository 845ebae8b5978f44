"""The choices of one call, and prompts that are scored: real shells, a fake engine, virtual time."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from router.dispatch.steps import Finished, Output, StepRequest
from sim import loop as virtual
from sim.faults import FaultPlan
from sim.shape import ROLES
from sim.text import VOCAB
from sim.world import World
from tests.sim import direct
from tracehaul.engine.base import Scoring, Work
from tracehaul.engine.fake import FakeEngine, expected_output, fake_info
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import NodeId, StepId, TraceId
from tracehaul.wire.steps import Sampling, TokenLogprobs

PROMPT = [(11 * at * at + 5 * at) % VOCAB for at in range(70)]
SEED = 3


class Answer(msgspec.Struct):
    tokens: list[int] = []
    prompt_logprobs: list[TokenLogprobs] = []
    finished: Finished | None = None


def in_world(local_prefill_tokens: int, test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(SEED, FaultPlan((), 0.0, 0.0005, 0.0005))
        worker = msgspec.structs.replace(world.shape.worker, local_prefill_tokens=local_prefill_tokens)
        world.shape = msgspec.structs.replace(world.shape, worker=worker)
        lives = [world.start(node) for node in ROLES]
        await asyncio.gather(*(life.ready.wait() for life in lives))
        await asyncio.sleep(5)
        await test(world)

    virtual.run(main, SEED)


async def ask(world: World, request: StepRequest) -> Answer:
    answer = Answer()
    events = direct.ask(world, request)
    while (event := await events.get()) is not None:
        if isinstance(event, ClusterError):
            raise event
        if isinstance(event, Output):
            answer.tokens += event.tokens
            answer.prompt_logprobs += event.prompt_logprobs
        else:
            answer.finished = event
    return answer


def request(name: str, sampling: Sampling, *, prompt_logprobs: int | None = None) -> StepRequest:
    return StepRequest(
        step=StepId(name),
        trace=TraceId("t"),
        parent=None,
        prompt=pack_tokens(PROMPT),
        sampling=sampling,
        decode=NodeId("decode-0"),
        prompt_logprobs=prompt_logprobs,
    )


def computed(world: World) -> int:
    return sum(life.engine.computed_tokens for life in world.lives.values() if life.engine is not None)


@pytest.mark.parametrize("local_prefill_tokens", [0, 200])
def test_forks_compute_their_prompt_once(local_prefill_tokens: int) -> None:
    async def test(world: World) -> None:
        output = 6
        samplings = [Sampling(max_tokens=output, seed=seed, frequency_penalty=0.5) for seed in range(4)]
        # At once, as two calls of the same prompt might come; the choices of one call come later than its first.
        answers = await asyncio.gather(*(ask(world, request(f"f-{i}", s)) for i, s in enumerate(samplings)))
        assert [answer.tokens for answer in answers] == [expected_output(PROMPT, s, VOCAB) for s in samplings]
        # Of what is shared, each computes again what is less than a block, and the token whose logits it needs.
        block_tokens = world.shape.engine.layout.block_tokens
        assert computed(world) <= len(PROMPT) + 3 * block_tokens + 4 * output

    in_world(local_prefill_tokens, test)


@pytest.mark.parametrize("local_prefill_tokens", [0, 200])
def test_a_scored_prompt_is_computed_anew_and_told_in_order(local_prefill_tokens: int) -> None:
    async def alone(sampling: Sampling) -> tuple[list[TokenLogprobs], list[int]]:
        engine = FakeEngine(fake_info(vocab_size=VOCAB))
        sequence = engine.open(200)
        assert sequence is not None
        (result,) = await engine.run([Work(sequence, PROMPT, scoring=Scoring(PROMPT[1:], 2))])
        return list(result.scores), expected_output(PROMPT, sampling, VOCAB)

    async def test(world: World) -> None:
        sampling = Sampling(max_tokens=3, temperature=0.0)
        scores, tokens = await alone(sampling)
        await ask(world, request("warm", sampling))
        before = computed(world)
        answer = await ask(world, request("scored", sampling, prompt_logprobs=2))
        assert answer.prompt_logprobs == scores
        assert answer.tokens == tokens
        assert answer.finished is not None
        assert (answer.finished.usage.computed_from, answer.finished.usage.resident_tokens) == (0, 0)
        assert computed(world) - before == len(PROMPT) + 2
        assert answer.finished.hits.losses == {}

    in_world(local_prefill_tokens, test)


def test_a_scored_step_that_moves_tells_nothing_twice() -> None:
    async def test(world: World) -> None:
        whole = await ask(world, request("whole", Sampling(max_tokens=2, temperature=0.0), prompt_logprobs=1))
        moved = asyncio.ensure_future(
            ask(world, request("moved", Sampling(max_tokens=30, temperature=0.0), prompt_logprobs=1))
        )
        await asyncio.sleep(0.02)
        life = world.lives[NodeId("decode-0")]
        world.crash(life)
        answer = await moved
        assert answer.prompt_logprobs == whole.prompt_logprobs
        assert answer.tokens == expected_output(PROMPT, Sampling(max_tokens=30, temperature=0.0), VOCAB)

    in_world(0, test)
