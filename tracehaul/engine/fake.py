"""An engine without a model, whose output proves that its KV bytes are right.

The KV of a token is a hash of all stored KV bytes before it and the token; the next token is a hash of all stored
KV bytes. So one wrong, stale or missing byte anywhere in the context changes every later token, and comparing
tokens with :func:`expected_output` checks the whole data path. What it cannot prove: anything about numerics,
threads, device memory, or a real engine's order of kernels.

Misuse that a real engine would answer with silent garbage fails an assertion here: overlapping runs, a call on a
closed sequence, touching positions under computation, closing what is still being copied.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from tracehaul.engine.base import CutShort, EngineInfo, Guide, Result, SequenceId, Work
from tracehaul.engine.grammar import Grammars, byte_vocabulary
from tracehaul.engine.history import History
from tracehaul.engine.sampling import Row, add_scores, choose, follow
from tracehaul.wire.hashing import TOKEN_BYTES, KVLayout
from tracehaul.wire.steps import Constraint, Sampling

T = TypeVar("T")
Bytes = NDArray[np.uint8]

FAKE_LAYOUT = KVLayout(model="fake", dtype="uint8", layers=2, kv_heads=1, head_dim=8, element_bytes=1, block_tokens=8)
"""32 bytes a token, cut into four pieces by the packed form, so a copy that mixes up axes does not go unseen."""

_GARBAGE = 0xA5
"""What memory holds before anybody wrote it: a reader of missing KV does not find zeros by luck."""
_FALL = 0.5
"""By how much each token's logit is below that of the one before it, from the likeliest on."""


class EngineCost(msgspec.Struct, frozen=True):
    """How long calls take, in seconds of the running loop's clock."""

    iteration_s: float = 0.0
    """Every run, whatever is in it."""
    prefill_token_s: float = 0.0
    """On top, for each token of an item with more than one."""
    sequence_s: float = 0.0
    """On top, for each item with one, but for the first."""
    copy_token_s: float = 0.0
    """For each token packed or unpacked."""


def fake_info(
    *,
    layout: KVLayout = FAKE_LAYOUT,
    context_max: int = 1024,
    kv_tokens_max: int = 4096,
    vocab_size: int = 256,
) -> EngineInfo:
    """What a fake engine of that size says of itself."""
    return EngineInfo(
        model=layout.model,
        layout=layout,
        context_max=context_max,
        kv_tokens_max=kv_tokens_max,
        vocab_size=vocab_size,
    )


class _Sequence:
    """Storage of one sequence, and what is being done to it."""

    def __init__(self, capacity: int, token_bytes: int) -> None:
        self.data: Bytes = np.full((capacity, token_bytes), _GARBAGE, dtype=np.uint8)
        self.length = 0
        self.calls = 0
        """Calls under way."""
        self.writing: tuple[int, int] | None = None
        """Positions under computation or being unpacked."""
        self.reading: list[tuple[int, int]] = []
        """Positions being packed."""


class FakeEngine:
    """Implements :class:`tracehaul.engine.base.Engine`. ``kv_tokens_max`` is handed out in whole blocks."""

    def __init__(self, info: EngineInfo | None = None, cost: EngineCost | None = None) -> None:
        self._info = info or fake_info()
        self._cost = cost or EngineCost()
        self._grammars = Grammars(lambda: byte_vocabulary(self._info.vocab_size))
        self._sequences: dict[SequenceId, _Sequence] = {}
        self._next_id = 1
        self._used = 0
        self._iteration: asyncio.Task[list[Result] | None] | None = None
        self._cut: asyncio.Future[None] | None = None
        self._awaited = False
        """Somebody still waits for ``_iteration``: a second run now is a bug."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self.computed_tokens = 0
        """Tokens whose KV was computed here, ever: what reuse is meant to save."""

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def free_tokens(self) -> int:
        return self._info.kv_tokens_max - self._used

    @property
    def sequences(self) -> list[SequenceId]:
        """Open sequences: none when everything was given back."""
        return list(self._sequences)

    def open(self, capacity: int) -> SequenceId | None:
        assert not self._closed, "the engine is closed"
        assert capacity >= 0
        need = self._round(capacity)
        if need > self.free_tokens:
            return None
        sequence = SequenceId(self._next_id)
        self._next_id += 1
        self._used += need
        self._sequences[sequence] = _Sequence(need, self._info.layout.token_bytes)
        return sequence

    def grow(self, sequence: SequenceId, capacity: int) -> bool:
        state = self._idle(sequence)
        more = self._round(capacity) - len(state.data)
        if more <= 0:
            return True
        if more > self.free_tokens:
            return False
        tail: Bytes = np.full((more, state.data.shape[1]), _GARBAGE, dtype=np.uint8)
        state.data = np.concatenate([state.data, tail])
        self._used += more
        return True

    def capacity(self, sequence: SequenceId) -> int:
        return len(self._sequences[sequence].data)

    def length(self, sequence: SequenceId) -> int:
        return self._sequences[sequence].length

    def truncate(self, sequence: SequenceId, length: int) -> None:
        state = self._sequences[sequence]
        assert 0 <= length <= state.length, f"truncate to {length} of {state.length}"
        assert state.writing is None, "truncate under a running computation"
        assert all(end <= length for _, end in state.reading), "truncate under a running pack"
        state.data[length : state.length] = _GARBAGE
        state.length = length

    def close(self, sequence: SequenceId) -> None:
        state = self._idle(sequence)
        self._used -= len(state.data)
        del self._sequences[sequence]

    async def guide(self, constraint: Constraint, output: Sequence[int]) -> Guide:
        """On the caller's thread. A token is a byte, and the last one of the vocabulary ends a text."""
        return self._grammars.guide_now(constraint, output)

    async def run(self, work: Sequence[Work]) -> list[Result]:
        assert not self._awaited, "one run at a time"
        self._awaited = True
        try:
            while self._iteration is not None and not self._iteration.done():
                await asyncio.wait([self._iteration])
            assert not self._closed, "the engine is closed"
            self._check_work(work)
            self._cut = asyncio.get_running_loop().create_future()
            self._iteration = self._spawn(self._iterate(work, self._mark(work), self._cut))
            results = await asyncio.shield(self._iteration)
            if results is None:
                raise CutShort
            return results
        finally:
            self._awaited = False

    def cut(self) -> None:
        if self._cut is not None and not self._cut.done():
            self._cut.set_result(None)

    def attach(self, memory: memoryview) -> None:
        pass

    async def pack(self, sequence: SequenceId, start: int, tokens: int, outs: Sequence[memoryview]) -> None:
        state = self._sequences[sequence]
        self._check_blocks(start, tokens, outs)
        end = start + tokens
        assert end <= state.length, f"pack [{start}, {end}) of {state.length} tokens"
        assert state.writing is None or end <= state.writing[0], "pack of positions under computation"
        state.calls += 1
        state.reading.append((start, end))
        await asyncio.shield(self._spawn(self._pack(state, start, tokens, outs)))

    async def unpack(self, sequence: SequenceId, start: int, tokens: int, blocks: Sequence[memoryview]) -> None:
        state = self._sequences[sequence]
        self._check_blocks(start, tokens, blocks)
        assert start == state.length, f"unpack at {start}, the sequence has {state.length} tokens"
        assert start + tokens <= len(state.data), "unpack beyond the capacity"
        assert state.writing is None, "unpack under a running computation"
        state.calls += 1
        state.writing = (start, start + tokens)
        await asyncio.shield(self._spawn(self._unpack(state, start, tokens, blocks)))

    async def aclose(self) -> None:
        self._closed = True
        while self._tasks:
            await asyncio.wait(list(self._tasks))
        self._sequences.clear()
        self._used = 0

    def check(self) -> None:
        """Assert that the accounting holds: used memory is the sum of what open sequences have."""
        assert self._used == sum(len(state.data) for state in self._sequences.values())
        assert 0 <= self._used <= self._info.kv_tokens_max
        assert all(0 <= state.length <= len(state.data) for state in self._sequences.values())

    # --- inside -------------------------------------------------------------------------------------------

    def _round(self, capacity: int) -> int:
        return -(-capacity // self._info.layout.block_tokens) * self._info.layout.block_tokens

    def _idle(self, sequence: SequenceId) -> _Sequence:
        state = self._sequences[sequence]
        assert state.calls == 0, "a call on this sequence is under way"
        return state

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run to the end even if the caller is cancelled, as a thread or a device would."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _check_work(self, work: Sequence[Work]) -> None:
        seen: list[SequenceId] = []
        for item in work:
            state = self._sequences[item.sequence]
            assert item.sequence not in seen, "a sequence appears at most once"
            seen.append(item.sequence)
            assert item.tokens, "an item without tokens"
            assert item.scoring is None or len(item.scoring.targets) <= len(item.tokens), "more targets than tokens"
            assert state.length + len(item.tokens) <= len(state.data), "run beyond the capacity"
            assert state.length + len(item.tokens) <= self._info.context_max, "run beyond the model's window"
            assert state.writing is None, "run under a running unpack"
            assert all(0 <= token < self._info.vocab_size for token in item.tokens), "token outside the vocabulary"

    def _check_blocks(self, start: int, tokens: int, blocks: Sequence[memoryview]) -> None:
        assert not self._closed, "the engine is closed"
        step = self._info.layout.block_tokens
        assert start % step == 0, f"{start} is not a multiple of {step}"
        assert tokens > 0, "an empty copy"
        sizes = [min(step, tokens - at) * self._info.layout.token_bytes for at in range(0, tokens, step)]
        assert [view.nbytes for view in blocks] == sizes, "views do not match the blocks"

    def _mark(self, work: Sequence[Work]) -> list[_Sequence]:
        states = [self._sequences[item.sequence] for item in work]
        for state, item in zip(states, work, strict=True):
            state.calls += 1
            state.writing = (state.length, state.length + len(item.tokens))
        return states

    async def _iterate(
        self, work: Sequence[Work], states: Sequence[_Sequence], cut: asyncio.Future[None]
    ) -> list[Result] | None:
        """None: it was cut."""
        try:
            prefill = sum(len(item.tokens) for item in work if len(item.tokens) > 1)
            others = max(0, sum(len(item.tokens) == 1 for item in work) - 1)
            cost = self._cost
            takes_s = cost.iteration_s + prefill * cost.prefill_token_s + others * cost.sequence_s
            await asyncio.wait([cut], timeout=takes_s) if takes_s > 0 else await asyncio.sleep(0)
            if cut.done():
                return None
            return [self._compute(item, state) for item, state in zip(work, states, strict=True)]
        finally:
            for state in states:
                state.calls -= 1
                state.writing = None

    def _compute(self, item: Work, state: _Sequence) -> Result:
        hasher = blake3(state.data[: state.length].tobytes())
        scored_rows: list[NDArray[np.float32]] = []
        targets = len(item.scoring.targets) if item.scoring is not None else 0
        for token in item.tokens:
            kv = _kv(hasher, token, self._info.layout.token_bytes)
            state.data[state.length] = np.frombuffer(kv, dtype=np.uint8)
            state.length += 1
            hasher.update(kv)
            if len(scored_rows) < targets:
                scored_rows.append(_logits(hasher.digest(), self._info.vocab_size))
        self.computed_tokens += len(item.tokens)
        result = Result()
        if item.sampling is not None:
            mask = None if item.guide is None else item.guide.mask()
            row = Row(item.sampling, state.length, item.emitted, item.history, mask)
            (result,) = follow([_choose(hasher.digest(), row, self._info.vocab_size)], [item.guide])
        return add_scores([result], [item], np.stack(scored_rows))[0] if scored_rows else result

    async def _pack(self, state: _Sequence, start: int, tokens: int, outs: Sequence[memoryview]) -> None:
        try:
            await asyncio.sleep(tokens * self._cost.copy_token_s)
            at = start
            for view in outs:
                count = view.nbytes // self._info.layout.token_bytes
                view[:] = pack_rows(self._info.layout, [row.tobytes() for row in state.data[at : at + count]])
                at += count
        finally:
            state.calls -= 1
            state.reading.remove((start, start + tokens))

    async def _unpack(self, state: _Sequence, start: int, tokens: int, blocks: Sequence[memoryview]) -> None:
        try:
            await asyncio.sleep(tokens * self._cost.copy_token_s)
            at = start
            layout = self._info.layout
            for view in blocks:
                count = view.nbytes // self._info.layout.token_bytes
                packed = np.frombuffer(view, dtype=np.uint8).reshape(
                    layout.layers, 2, layout.kv_heads, count, layout.head_dim * layout.element_bytes
                )
                state.data[at : at + count] = packed.transpose(3, 0, 1, 2, 4).reshape(count, -1)
                at += count
            state.length = at
        finally:
            state.calls -= 1
            state.writing = None


class TrueState:
    """What the model knows after a run of tokens, computed in one place without any store.

    ``kv[p]`` are the KV bytes of position ``p``, one run of ``token_bytes`` each.
    """

    def __init__(self, vocab_size: int, token_bytes: int = FAKE_LAYOUT.token_bytes) -> None:
        self._vocab_size = vocab_size
        self._token_bytes = token_bytes
        self._hasher = blake3()
        self.tokens: list[int] = []
        self.kv: list[bytes] = []

    def copy(self) -> "TrueState":
        """An independent state: a fork."""
        other = TrueState(self._vocab_size, self._token_bytes)
        other._hasher = self._hasher.copy()
        other.tokens = list(self.tokens)
        other.kv = list(self.kv)
        return other

    def extend(self, tokens: Sequence[int]) -> None:
        """Append ``tokens``."""
        for token in tokens:
            kv = _kv(self._hasher, token, self._token_bytes)
            self._hasher.update(kv)
            self.tokens.append(token)
            self.kv.append(kv)

    def generate(self, sampling: Sampling) -> list[int]:
        """The whole output of a step whose prompt is :attr:`tokens`; this state stays as it is."""
        assert self.tokens
        hasher = self._hasher.copy()
        output: list[int] = []
        history = History.of(sampling, self.tokens, 0)
        while True:
            position = len(self.tokens) + len(output)
            token = _choose(hasher.digest(), Row(sampling, position, len(output), history), self._vocab_size).token
            assert token is not None
            output.append(token)
            if history is not None:
                history.add(token)
            if token in sampling.stop_tokens or len(output) == sampling.max_tokens:
                return output
            hasher.update(_kv(hasher, token, self._token_bytes))


def expected_output(
    prompt: Sequence[int], sampling: Sampling, vocab_size: int, token_bytes: int = FAKE_LAYOUT.token_bytes
) -> list[int]:
    """What one process without any store would emit for this step: the oracle of every test with a fake engine.

    Ends after ``max_tokens``, or after a stop token, which is the last item.
    """
    state = TrueState(vocab_size, token_bytes)
    state.extend(prompt)
    return state.generate(sampling)


def pack_rows(layout: KVLayout, rows: Sequence[bytes]) -> bytes:
    """KV of consecutive tokens (``token_bytes`` each, as :attr:`TrueState.kv` has them) as one packed block."""
    shape = (len(rows), layout.layers, 2, layout.kv_heads, layout.head_dim * layout.element_bytes)
    array = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(shape)
    return np.ascontiguousarray(array.transpose(1, 2, 3, 0, 4)).tobytes()


def _kv(hasher: blake3, token: int, token_bytes: int) -> bytes:
    """KV bytes of ``token`` after everything that ``hasher`` has seen."""
    own = hasher.copy()
    own.update(token.to_bytes(TOKEN_BYTES, "little"))
    return own.digest(token_bytes)


def _choose(state: bytes, row: Row, vocab_size: int) -> Result:
    return choose(_logits(state, vocab_size)[None], [row])[0]


def _logits(state: bytes, vocab_size: int) -> NDArray[np.float32]:
    """Likeliest is the token that ``state`` names, and each of those after it is less so."""
    first = int.from_bytes(state[:8], "little") % vocab_size
    fall: NDArray[np.float32] = np.arange(vocab_size, dtype=np.float32) * -_FALL
    return np.roll(fall, first)
