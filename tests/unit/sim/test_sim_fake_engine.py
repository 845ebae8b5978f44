"""The fake engine: output is a function of the stored bytes, and misuse fails."""

import asyncio
import random

import pytest

from sim import loop as virtual
from tracehaul.engine.base import Result, Work
from tracehaul.engine.fake import FAKE_LAYOUT, EngineCost, FakeEngine, TrueState, expected_output, fake_info, pack_rows
from tracehaul.wire.steps import Sampling

VOCAB = 256
PROMPT = list(range(10, 31))


def engine(**kwargs):
    return FakeEngine(fake_info(vocab_size=VOCAB, kv_tokens_max=256), EngineCost(**kwargs))


async def generate(fake, sequence, prompt, sampling, start=0, chunk=7):
    """Prefill ``prompt[start:]`` in chunks, then decode to the end."""
    for at in range(start, len(prompt) - 1, chunk):
        assert await fake.run([Work(sequence, prompt[at : min(at + chunk, len(prompt) - 1)])]) == [Result()]
    output, token = [], prompt[-1]
    while True:
        [result] = await fake.run([Work(sequence, [token], sampling, emitted=len(output))])
        token = result.token
        output.append(token)
        if token in sampling.stop_tokens or len(output) == sampling.max_tokens:
            return output


def buffers(tokens):
    step = FAKE_LAYOUT.block_tokens
    return [bytearray(min(step, tokens - at) * FAKE_LAYOUT.token_bytes) for at in range(0, tokens, step)]


def views(blocks):
    return [memoryview(block) for block in blocks]


@pytest.mark.parametrize("seed", range(5))
def test_chunks_and_batches_do_not_change_the_output(seed):
    rng = random.Random(seed)
    sampling = Sampling(max_tokens=12, temperature=rng.choice([0.0, 1.0]), seed=seed, stop_tokens=(0, 1, 2))

    async def main():
        fake = engine()
        sequence = fake.open(64)
        return await generate(fake, sequence, PROMPT, sampling, chunk=rng.randint(1, 30))

    assert virtual.run(main) == expected_output(PROMPT, sampling, VOCAB)


def test_packed_blocks_continue_elsewhere_and_a_flipped_bit_shows():
    sampling = Sampling(max_tokens=5, temperature=0)

    async def main():
        first, second, third = engine(), engine(), engine()
        source = first.open(64)
        await first.run([Work(source, PROMPT)])
        blocks = buffers(20)
        await first.pack(source, 0, 20, views(blocks))
        good = second.open(64)
        await second.unpack(good, 0, 16, views(blocks[:2]))
        await second.unpack(good, 16, 4, views(blocks[2:]))
        assert second.length(good) == 20
        blocks[0][3] ^= 1
        bad = third.open(64)
        await third.unpack(bad, 0, 20, views(blocks))
        return (
            await generate(second, good, PROMPT, sampling, start=20),
            await generate(third, bad, PROMPT, sampling, start=20),
        )

    good, bad = virtual.run(main)
    assert good == expected_output(PROMPT, sampling, VOCAB)
    assert bad != good


def test_partial_block_is_laid_out_as_the_layout_says():
    async def main():
        fake = engine()
        sequence = fake.open(16)
        await fake.run([Work(sequence, PROMPT[:3])])
        one = buffers(1)
        await fake.pack(sequence, 0, 1, views(one))
        three = buffers(3)
        await fake.pack(sequence, 0, 3, views(three))
        return one[0], three[0]

    one, three = virtual.run(main)
    width = FAKE_LAYOUT.head_dim
    pieces = [bytes(three[i * 3 * width : i * 3 * width + width]) for i in range(4)]
    assert b"".join(pieces) == bytes(one)


def test_the_true_state_has_the_bytes_of_the_engine():
    async def main():
        fake = engine()
        sequence = fake.open(32)
        await fake.run([Work(sequence, PROMPT)])
        blocks = buffers(len(PROMPT))
        await fake.pack(sequence, 0, len(PROMPT), views(blocks))
        return [bytes(block) for block in blocks]

    state = TrueState(VOCAB)
    state.extend(PROMPT[:5])
    fork = state.copy()
    fork.extend(PROMPT[5:])
    assert state.tokens == PROMPT[:5]
    step = FAKE_LAYOUT.block_tokens
    expected = [pack_rows(FAKE_LAYOUT, fork.kv[at : at + step]) for at in range(0, len(PROMPT), step)]
    assert virtual.run(main) == expected


def test_sampling_depends_on_seed_and_position_only():
    def out(**kwargs):
        return expected_output(PROMPT, Sampling(max_tokens=20, **kwargs), VOCAB)

    assert out(temperature=0, seed=1) == out(temperature=0, seed=2)
    assert out(temperature=1, seed=1) != out(temperature=1, seed=2)
    assert out(temperature=1, top_k=1, seed=1) == out(temperature=0)
    assert out(temperature=1, top_p=0.01, seed=1) == out(temperature=0)
    # A step moved in mid-stream: what was emitted is part of the sequence, positions go on.
    whole = out(temperature=1, seed=3)
    rest = expected_output(PROMPT + whole[:8], Sampling(max_tokens=12, seed=3), VOCAB)
    assert rest == whole[8:]


def test_stop_ends_and_min_tokens_masks_it():
    free = expected_output(PROMPT, Sampling(max_tokens=10, temperature=0), VOCAB)
    stop = (free[2],)
    assert expected_output(PROMPT, Sampling(max_tokens=10, temperature=0, stop_tokens=stop), VOCAB) == free[:3]
    masked = expected_output(PROMPT, Sampling(max_tokens=10, temperature=0, stop_tokens=stop, min_tokens=6), VOCAB)
    assert len(masked) >= 6
    assert stop[0] not in masked[:6]


def test_memory_is_accounted_in_whole_blocks():
    async def main():
        fake = engine()
        assert fake.open(257) is None
        first = fake.open(250)
        assert first is not None
        assert fake.capacity(first) == 256
        assert fake.free_tokens == 0
        assert fake.open(1) is None
        fake.close(first)
        second = fake.open(8)
        assert second is not None
        await fake.run([Work(second, PROMPT[:8])])
        assert fake.grow(second, 9)
        assert fake.free_tokens == 256 - 16
        assert not fake.grow(second, 257)
        assert fake.length(second) == 8
        fake.check()

    virtual.run(main)


def test_misuse_fails():
    async def main():
        fake = engine(iteration_s=1.0)
        sequence = fake.open(16)
        assert sequence is not None
        running = asyncio.ensure_future(fake.run([Work(sequence, PROMPT[:8])]))
        await asyncio.sleep(0.5)
        with pytest.raises(AssertionError, match="one run"):
            await fake.run([Work(sequence, [1])])
        with pytest.raises(AssertionError, match="under way"):
            fake.close(sequence)
        with pytest.raises(AssertionError, match="under a running"):
            await fake.unpack(sequence, 0, 8, views(buffers(8)))
        await running
        with pytest.raises(AssertionError, match="unpack at 0"):
            await fake.unpack(sequence, 0, 8, views(buffers(8)))
        with pytest.raises(AssertionError, match="multiple"):
            await fake.pack(sequence, 1, 7, views(buffers(7)))
        with pytest.raises(AssertionError, match="beyond the capacity"):
            await fake.run([Work(sequence, PROMPT[:9])])
        fake.close(sequence)
        with pytest.raises(KeyError):
            await fake.run([Work(sequence, [1])])

    virtual.run(main)


def test_a_cancelled_run_ends_by_itself_and_the_next_waits():
    async def main():
        fake = engine(iteration_s=1.0)
        sequence = fake.open(16)
        assert sequence is not None
        running = asyncio.ensure_future(fake.run([Work(sequence, PROMPT[:8])]))
        await asyncio.sleep(0.5)
        running.cancel()
        await asyncio.wait([running])
        other = fake.open(8)
        assert other is not None
        await fake.run([Work(other, [1])])
        assert fake.length(sequence) == 8
        return asyncio.get_running_loop().time()

    assert virtual.run(main) == pytest.approx(2.0)


def test_cost_takes_virtual_time():
    async def main():
        fake = engine(iteration_s=0.01, prefill_token_s=0.001, copy_token_s=0.1)
        sequence = fake.open(16)
        assert sequence is not None
        await fake.run([Work(sequence, PROMPT[:8])])
        await fake.run([Work(sequence, [1])])
        await fake.pack(sequence, 0, 8, views(buffers(8)))
        return asyncio.get_running_loop().time()

    assert virtual.run(main) == pytest.approx(0.018 + 0.01 + 0.8)
