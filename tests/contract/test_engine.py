"""What every engine promises: the same assertions for the fake and for torch on tiny random models."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from tracehaul.engine import paged_attention, torch_engine
from tracehaul.engine.base import CutShort, Engine, Result, Scoring, SequenceId, Work
from tracehaul.engine.fake import FakeEngine
from tracehaul.engine.history import History
from tracehaul.engine.paged import PagedModel
from tracehaul.engine.paged_kernels import KERNELS
from tracehaul.engine.paged_pool import PagedPool
from tracehaul.engine.torch_engine import TorchEngine, TorchEngineConfig
from tracehaul.engine.weights import Weights
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.hashing import KVLayout
from tracehaul.wire.steps import Constraint, Sampling, TokenLogprobs

GREEDY = Sampling(max_tokens=100, temperature=0.0)
SEEDED = Sampling(max_tokens=100, temperature=1.0, top_p=0.95, seed=7)
PROMPT = [(7 * at * at + 3 * at) % 200 for at in range(45)]
OTHER = [(5 * at + 11) % 200 for at in range(20)]

MakeEngine = Callable[[], Awaitable[Engine]]


def save_tiny_model(folder: Path, head_dim: int) -> Path:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=255,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), 16)


@pytest.fixture(scope="module")
def wider_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads as the compiled kernels want them."""
    return save_tiny_model(tmp_path_factory.mktemp("wider"), 32)


def byte_tokenizer() -> Tokenizer:
    """A token is a byte, and the last one ends a text: the fake engine's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(rest)}
    tokenizer = Tokenizer(BPE({letters[byte]: byte for byte in range(255)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return tokenizer


def paged_on_cpu(
    weights: Weights, layout: KVLayout, tokens_max: int, dtype: torch.dtype, device: torch.device, _: int
) -> tuple[PagedModel, PagedPool]:
    """What a GPU runs, with the kernel interpreted and without graphs."""
    pool = PagedPool(layout, tokens_max // layout.block_tokens, dtype, device)
    return PagedModel(weights, pool.tensor, KERNELS, None), pool


@pytest.fixture(
    params=[
        "fake",
        "torch",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("compiled", "paged")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def make_engine(
    request: pytest.FixtureRequest, tiny_model: Path, wider_model: Path, monkeypatch: pytest.MonkeyPatch
) -> MakeEngine:
    if request.param == "paged":
        monkeypatch.setattr(torch_engine, "_model_and_pool", paged_on_cpu)
        monkeypatch.setattr(torch_engine, "WARM_UP_TOKENS", 2)  # an interpreted kernel is slow
        monkeypatch.setattr(paged_attention, "SPLITS_MAX", 1)

    async def make() -> Engine:
        if request.param == "fake":
            return FakeEngine()
        device = "cuda" if request.param == "cuda" else "cpu"
        config = TorchEngineConfig(
            model=str(wider_model if request.param == "compiled" else tiny_model),
            dtype="float32",
            device=device,
            threads=1,
            kv_tokens_max=512,
            block_tokens=8,
        )
        return await TorchEngine.load(config)

    return make


def with_engine(make_engine: MakeEngine, test: Callable[[Engine], Awaitable[None]]) -> None:
    async def main() -> None:
        engine = await make_engine()
        try:
            await test(engine)
        finally:
            await engine.aclose()

    asyncio.run(main())


def opened(engine: Engine, capacity: int) -> SequenceId:
    sequence = engine.open(capacity)
    assert sequence is not None
    return sequence


async def generate(
    engine: Engine, sequence: SequenceId, tokens: list[int], count: int, sampling: Sampling = GREEDY
) -> list[int]:
    output: list[int] = []
    for _ in range(count):
        (result,) = await engine.run([Work(sequence, tokens, sampling, len(output))])
        assert result.token is not None
        output.append(result.token)
        tokens = [result.token]
    return output


def test_an_iteration_that_is_cut_short_has_changed_nothing(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        engine.cut()  # there is none
        whole = await generate(engine, opened(engine, 64), PROMPT, 6)
        sequence, output, cuts = opened(engine, 64), list[int](), 0
        while len(output) < 6:
            tokens = output[-1:] or PROMPT
            running = asyncio.ensure_future(engine.run([Work(sequence, tokens, GREEDY, len(output))]))
            before = engine.length(sequence)
            if cuts < 20:
                await asyncio.sleep(0)
                engine.cut()
            try:
                (result,) = await running
            except CutShort:
                cuts += 1
                assert engine.length(sequence) == before
                continue
            assert result.token is not None
            output.append(result.token)
        assert output == whole

    with_engine(make_engine, test)


async def packed(engine: Engine, sequence: SequenceId, start: int, tokens: int) -> list[bytearray]:
    layout = engine.info.layout
    cuts = range(start, start + tokens, layout.block_tokens)
    blocks = [bytearray(min(layout.block_tokens, start + tokens - at) * layout.token_bytes) for at in cuts]
    await engine.pack(sequence, start, tokens, [memoryview(block) for block in blocks])
    return blocks


def test_memory_is_given_counted_and_taken_back(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        everything = engine.free_tokens
        assert everything == engine.info.kv_tokens_max
        first = opened(engine, 50)
        assert engine.capacity(first) >= 50
        assert engine.length(first) == 0
        assert engine.free_tokens == everything - engine.capacity(first)
        assert engine.open(everything) is None
        rest = opened(engine, engine.free_tokens)
        assert engine.open(1) is None
        assert not engine.grow(first, engine.capacity(first) + 1)
        engine.close(rest)
        engine.close(first)
        assert engine.free_tokens == everything

    with_engine(make_engine, test)


def test_chunks_give_what_one_shot_gives(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        whole, chunked = opened(engine, 100), opened(engine, 100)
        expected = await generate(engine, whole, PROMPT, 12)
        for start, end in ((0, 17), (17, 18), (18, 40)):
            assert await engine.run([Work(chunked, PROMPT[start:end])]) == [Result()]
            assert engine.length(chunked) == end
        assert await generate(engine, chunked, PROMPT[40:], 12) == expected

    with_engine(make_engine, test)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
def test_a_batch_gives_what_each_gives_alone(make_engine: MakeEngine, sampling: Sampling) -> None:
    async def test(engine: Engine) -> None:
        alone = [await generate(engine, opened(engine, 64), tokens, 6, sampling) for tokens in (PROMPT, OTHER)]
        first, second = opened(engine, 64), opened(engine, 64)
        got = [await engine.run([Work(first, PROMPT, sampling)]), await engine.run([Work(second, OTHER[:-1])])]
        output = [[got[0][0].token], []]
        feed = [[got[0][0].token], OTHER[-1:]]
        for _ in range(5):
            results = await engine.run(
                [
                    Work(first, feed[0], sampling, len(output[0])),
                    Work(second, feed[1], sampling, len(output[1])),
                ]
            )
            for at, result in enumerate(results):
                output[at].append(result.token)
                feed[at] = [result.token]
        assert output[0] == alone[0]
        assert output[1] == alone[1][:5]

    with_engine(make_engine, test)


def test_packed_blocks_continue_in_another_sequence(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        source = opened(engine, 64)
        await engine.run([Work(source, PROMPT[:-1])])
        split = 2 * engine.info.layout.block_tokens
        blocks = await packed(engine, source, 0, split)
        tail = await packed(engine, source, split, len(PROMPT) - 1 - split)
        expected = await generate(engine, source, PROMPT[-1:], 8)
        opened(engine, 8)  # so that the target lies elsewhere
        target = opened(engine, 64)
        await engine.unpack(target, 0, split, [memoryview(block) for block in blocks])
        assert engine.length(target) == split
        await engine.unpack(target, split, len(PROMPT) - 1 - split, [memoryview(block) for block in tail])
        assert await packed(engine, target, 0, split) == blocks
        assert await generate(engine, target, PROMPT[-1:], 8) == expected

    with_engine(make_engine, test)


def test_wrong_bytes_change_the_output(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        source = opened(engine, 64)
        await engine.run([Work(source, OTHER[:16])])
        blocks = await packed(engine, source, 0, 16)
        expected = await generate(engine, source, OTHER[16:], 12)
        wrong = [memoryview(bytearray(len(block))) for block in blocks]
        target = opened(engine, 64)
        await engine.unpack(target, 0, 16, wrong)
        assert await generate(engine, target, OTHER[16:], 12) != expected

    with_engine(make_engine, test)


def test_truncating_takes_back_tokens(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        sequence = opened(engine, 100)
        expected = await generate(engine, sequence, PROMPT, 5)
        engine.truncate(sequence, 20)
        assert engine.length(sequence) == 20
        await engine.run([Work(sequence, OTHER)])
        engine.truncate(sequence, 20)
        assert await generate(engine, sequence, PROMPT[20:], 5) == expected

    with_engine(make_engine, test)


@pytest.mark.parametrize("neighbour", [False, True])
def test_growing_keeps_the_contents(make_engine: MakeEngine, neighbour: bool) -> None:
    async def test(engine: Engine) -> None:
        expected = await generate(engine, opened(engine, 100), PROMPT, 8)
        sequence = opened(engine, 40)
        if neighbour:
            opened(engine, 8)
        await engine.run([Work(sequence, PROMPT[:40])])
        assert engine.grow(sequence, 100)
        assert engine.capacity(sequence) >= 100
        assert engine.length(sequence) == 40
        assert await generate(engine, sequence, PROMPT[40:], 8) == expected

    with_engine(make_engine, test)


def test_a_cancelled_wait_lets_the_iteration_end(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        expected = await generate(engine, opened(engine, 64), PROMPT, 3)
        sequence = opened(engine, 64)
        waiter = asyncio.ensure_future(engine.run([Work(sequence, PROMPT[:30])]))
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        other = opened(engine, 64)
        await engine.run([Work(other, OTHER)])  # waits for the cancelled one
        assert engine.length(sequence) == 30
        assert await generate(engine, sequence, PROMPT[30:], 3) == expected

    with_engine(make_engine, test)


def test_copies_run_beside_an_iteration(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        first, second, third = (opened(engine, 64) for _ in range(3))
        await engine.run([Work(first, PROMPT[:32])])
        blocks = await packed(engine, first, 0, 32)
        _, again, _ = await asyncio.gather(
            engine.run([Work(first, PROMPT[32:]), Work(second, OTHER)]),
            packed(engine, first, 0, 32),
            engine.unpack(third, 0, 32, [memoryview(block) for block in blocks]),
        )
        assert again == blocks
        assert [engine.length(s) for s in (first, second, third)] == [len(PROMPT), len(OTHER), 32]

    with_engine(make_engine, test)


def test_logprobs_come_with_the_token(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        telling = Sampling(max_tokens=9, temperature=0.0, logprobs=3)
        sequence = opened(engine, 64)
        (result,) = await engine.run([Work(sequence, PROMPT, telling)])
        assert result.logprobs is not None
        top = result.logprobs.top
        assert top[0] == (result.token, result.logprobs.logprob)
        assert [logprob for _, logprob in top] == sorted((logprob for _, logprob in top), reverse=True)
        assert len({token for token, _ in top}) == 3
        engine.truncate(sequence, len(PROMPT) - 1)
        biased = Sampling(max_tokens=9, temperature=0.0, logprobs=0, logit_bias=((top[2][0], 100.0),))
        (other,) = await engine.run([Work(sequence, PROMPT[-1:], biased)])
        assert other.token == top[2][0]
        assert other.logprobs is not None
        # The model's own, whatever a request wants of the choice.
        assert other.logprobs.top == ()
        assert abs(other.logprobs.logprob - top[2][1]) < 1e-4

    with_engine(make_engine, test)


def test_penalties_count_what_was_said(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        alone = await generate(engine, opened(engine, 64), PROMPT, 1)
        sampling = Sampling(max_tokens=9, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
        for times, same in ((0, True), (40, False)):
            sequence = opened(engine, 64)
            history = History([], alone * times)
            (result,) = await engine.run([Work(sequence, PROMPT, sampling, times, history)])
            assert (result.token == alone[0]) == same
            engine.close(sequence)

    with_engine(make_engine, test)


def test_known_tokens_are_scored(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        telling = Sampling(max_tokens=9, temperature=0.0, logprobs=2)
        one_by_one: list[TokenLogprobs] = []
        sequence = opened(engine, 64)
        for token in PROMPT[:12]:
            (result,) = await engine.run([Work(sequence, [token], telling)])
            assert result.logprobs is not None
            one_by_one.append(result.logprobs)
        scored: list[TokenLogprobs] = []
        sequence, other = opened(engine, 64), opened(engine, 64)
        for start, end in ((0, 5), (5, 6), (6, 12)):
            targets = PROMPT[start + 1 : min(end + 1, 12)]
            work = Work(sequence, PROMPT[start:end], telling if end == 12 else None, scoring=Scoring(targets, 2))
            results = await engine.run([Work(other, OTHER[start:end], telling), work])
            assert len(results[0].scores) == 0
            assert len(results[1].scores) == len(targets)
            assert (results[1].token is not None) == (end == 12)
            scored += results[1].scores
        assert len(scored) == 11
        for place, found in enumerate(scored):
            told = one_by_one[place]
            assert [token for token, _ in found.top] == [token for token, _ in told.top]
            assert all(abs(a - b) < 1e-4 for (_, a), (_, b) in zip(found.top, told.top, strict=True))
            own = next((logprob for token, logprob in told.top if token == PROMPT[place + 1]), None)
            assert found.logprob <= told.top[0][1] + 1e-4
            assert own is None or abs(own - found.logprob) < 1e-4

    with_engine(make_engine, test)


def test_stop_tokens_wait_for_min_tokens(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        (first,) = await generate(engine, opened(engine, 64), PROMPT, 1)
        masked = Sampling(max_tokens=9, temperature=0.0, stop_tokens=(first,), min_tokens=1)
        sequence = opened(engine, 64)
        (instead,) = await engine.run([Work(sequence, PROMPT, masked, 0)])
        assert instead.token != first
        engine.truncate(sequence, len(PROMPT) - 1)
        assert await engine.run([Work(sequence, PROMPT[-1:], masked, 1)]) == [Result(first)]

    with_engine(make_engine, test)


def test_a_guide_keeps_the_output_to_its_grammar_and_then_to_the_end(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        digits = Constraint("regex", "[0-9]{3}x")
        for sampling in (GREEDY, SEEDED):
            guide = await engine.guide(digits, [])
            sequence, output, tokens = opened(engine, 64), list[int](), PROMPT
            for _ in range(5):
                (result,) = await engine.run([Work(sequence, tokens, sampling, len(output), guide=guide)])
                assert result.token is not None
                output.append(result.token)
                tokens = [result.token]
            assert re.fullmatch(r"[0-9]{3}x", bytes(output[:4]).decode())
            assert output[4] == 255
            # Elsewhere, from the middle of it on: nothing else is left to know.
            again, elsewhere = await engine.guide(digits, output[:2]), opened(engine, 64)
            await engine.run([Work(elsewhere, [*PROMPT, *output[:1]])])
            (result,) = await engine.run([Work(elsewhere, output[1:2], sampling, 2, guide=again)])
            assert result.token == output[2]
            engine.close(sequence)
            engine.close(elsewhere)

    with_engine(make_engine, test)


def test_a_guide_is_its_own_rows_alone(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        alone = await generate(engine, opened(engine, 64), PROMPT, 1)
        guide = await engine.guide(Constraint("regex", "[0-9]+"), [])
        first, second = opened(engine, 64), opened(engine, 64)
        free, bound = await engine.run([Work(first, PROMPT, GREEDY), Work(second, PROMPT, GREEDY, guide=guide)])
        assert [free.token] == alone
        assert bound.token is not None
        assert chr(bound.token).isdigit()

    with_engine(make_engine, test)


def test_what_is_no_grammar_is_refused(make_engine: MakeEngine) -> None:
    async def test(engine: Engine) -> None:
        with pytest.raises(InvalidRequest, match="unclosed"):
            await engine.guide(Constraint("regex", "(a"), [])
        with pytest.raises(InvalidRequest, match="does not match"):
            await engine.guide(Constraint("regex", "a+"), [ord("b")])

    with_engine(make_engine, test)
