"""The engine on torch: one compute thread for iterations, one copy thread for KV blocks."""

import asyncio
import ctypes
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import torch

from tracehaul.engine.base import CutShort, EngineInfo, Guide, Mask, Result, SequenceId, Work
from tracehaul.engine.cpu.host_model import HostModel, is_supported
from tracehaul.engine.grammar import Grammars, Masker, vocabulary
from tracehaul.engine.hardware import hardware
from tracehaul.engine.kept_weights import kept_weights
from tracehaul.engine.kvpool import Cut, HostPool, KVPool
from tracehaul.engine.model import Model, Segment
from tracehaul.engine.paged import PagedModel, cuda_capture
from tracehaul.engine.paged_pool import PagedPool
from tracehaul.engine.ranges import BlockAllocator, RangeAllocator, Space
from tracehaul.engine.sampling import Row, add_scores, choose, follow, is_plain_greedy
from tracehaul.engine.weights import Weights
from tracehaul.model.model_config import ModelConfig
from tracehaul.model.source import (
    DEFAULT_MODEL,
    ModelSource,
    Progress,
    SourceError,
    default_cache_dir,
    read_config,
    resolve,
)
from tracehaul.wire.hashing import KVLayout
from tracehaul.wire.steps import Constraint

T = TypeVar("T")
AnyModel = Model | HostModel | PagedModel

WARM_UP_TOKENS = 513
"""Tokens of the first sequence, at load: a worker's whole chunk, whose memory is kept, and one more. Four times as many
on a GPU: enough of them to fill it."""
WARM_UP_COMPILED_TOKENS = 33
"""On compiled kernels: enough that all of them run, and the memory of more is the system's to give in no time."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class TorchEngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to run and on what."""

    model: str = DEFAULT_MODEL
    """As :func:`tracehaul.model.source.resolve` takes it."""
    name: str = ""
    """What clients call it by; empty: as its files do."""
    pool: str = ""
    """Blocks of one pool are of no use in another, whatever the weights are."""
    cache_dir: str | None = None
    """Where a fetched default model is kept, and weights that had to be made; None: the user's cache folder."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    weights: Literal["int8"] | None = None
    """Matrices rounded to int8, each row with a scale, on the CPU; None: of ``dtype``, as KV and activations are."""
    device: str = "auto"
    """``cpu``, or a CUDA device as torch names it; ``auto``: CUDA where there is one."""
    threads: int = 2
    """CPU threads of an iteration."""
    kv_tokens_max: int = 32_768
    """KV memory in tokens; rounded down to whole blocks."""
    block_tokens: int = 32


class _Sequence:
    """A sequence's blocks of the pool, and how much of them holds KV."""

    __slots__ = ("busy", "closed", "length", "table")

    def __init__(self, table: Sequence[int]) -> None:
        self.table = table
        self.length = 0
        self.busy = 0
        """Calls under way; after a cancelled wait they outlive their caller."""
        self.closed = False


class TorchEngine:
    """Implements :class:`tracehaul.engine.base.Engine`; made by :meth:`load`.

    On the CPU a sequence's memory is one contiguous range of the pool. Growing takes the neighbouring blocks if they
    are free, otherwise the sequence moves, which copies its KV on the caller's thread: open with the capacity that is
    foreseen. On a CUDA device it is any blocks, by a table.
    """

    def __init__(
        self,
        info: EngineInfo,
        model: AnyModel,
        pool: KVPool,
        grammars: Grammars,
        compute: ThreadPoolExecutor,
    ) -> None:
        self._info = info
        self._block_tokens = info.layout.block_tokens
        self._model = model
        self._pool = pool
        self._device = pool.tensor.device
        self._grammars = grammars
        self._masker = Masker()
        self._compute = compute
        self._copy = ThreadPoolExecutor(1, thread_name_prefix="kv-copy")
        allocator = BlockAllocator if isinstance(model, PagedModel) else RangeAllocator
        self._space: Space = allocator(info.kv_tokens_max // self._block_tokens)
        self._sequences: dict[SequenceId, _Sequence] = {}
        self._next_id = 0
        self._under_way: set[asyncio.Task[Any]] = set()
        self._turn = asyncio.Lock()

    @classmethod
    async def load(cls, config: TorchEngineConfig, progress: Progress | None = None) -> "TorchEngine":
        """Fetch the model if needed, read it, and touch the KV memory. ``progress`` is called from another thread.

        Raises:
            SourceError: the model cannot be had, or the device or its memory is not there.
        """
        compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        try:
            loaded = await asyncio.get_running_loop().run_in_executor(compute, partial(_load, config, progress))
        except BaseException:
            compute.shutdown(wait=False, cancel_futures=True)
            raise
        return cls(*loaded, compute)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def free_tokens(self) -> int:
        return self._space.free * self._block_tokens

    # --- sequences ----------------------------------------------------------------------------------------

    def open(self, capacity: int) -> SequenceId | None:
        table = self._space.allocate(self._blocks(capacity))
        if table is None:
            return None
        handle = SequenceId(self._next_id)
        self._next_id += 1
        self._sequences[handle] = _Sequence(table)
        return handle

    def grow(self, sequence: SequenceId, capacity: int) -> bool:
        it = self._sequences[sequence]
        assert it.busy == 0, "grow while a call on the sequence is under way"
        blocks = self._blocks(capacity)
        if blocks <= len(it.table):
            return True
        table = self._space.extend(it.table, blocks - len(it.table))
        if table is None:
            table = self._space.allocate(blocks)
            if table is None:
                return False
            if it.length > 0:
                self._pool.move(it.table[0] * self._block_tokens, table[0] * self._block_tokens, it.length)
            self._space.release(it.table)
        it.table = table
        return True

    def capacity(self, sequence: SequenceId) -> int:
        return len(self._sequences[sequence].table) * self._block_tokens

    def length(self, sequence: SequenceId) -> int:
        return self._sequences[sequence].length

    def truncate(self, sequence: SequenceId, length: int) -> None:
        it = self._sequences[sequence]
        assert 0 <= length <= it.length, f"truncate to {length} of {it.length}"
        it.length = length

    def close(self, sequence: SequenceId) -> None:
        it = self._sequences.pop(sequence)
        it.closed = True
        if it.busy == 0:
            self._space.release(it.table)

    # --- iterations ---------------------------------------------------------------------------------------

    async def guide(self, constraint: Constraint, output: Sequence[int]) -> Guide:
        return await self._grammars.guide(constraint, output)

    async def run(self, work: Sequence[Work]) -> list[Result]:
        if not work:
            return []
        items = [self._sequences[item.sequence] for item in work]
        assert len(set(map(id, items))) == len(items), "a sequence twice in one iteration"
        return await self._detached(self._run(items, list(work)), items)

    async def _run(self, items: list[_Sequence], work: list[Work]) -> list[Result]:
        async with self._turn:
            for it, item in zip(items, work, strict=True):
                assert item.tokens, "work without tokens"
                assert it.length + len(item.tokens) <= len(it.table) * self._block_tokens, (
                    "over the sequence's capacity"
                )
                assert it.length + len(item.tokens) <= self._info.context_max, "over the model's window"
            segments = self._segments(items, work)
            tables = [it.table for it in items]
            result = await self._on(self._compute, partial(self._iterate, segments, tables, work))
            for it, item in zip(items, work, strict=True):
                it.length += len(item.tokens)
            return result

    def _segments(self, items: list[_Sequence], work: list[Work]) -> list[Segment]:
        segments: list[Segment] = []
        row = 0
        for it, item in zip(items, work, strict=True):
            segments.append(Segment(row, len(item.tokens), it.table[0] * self._block_tokens, it.length))
            row += len(item.tokens)
        return segments

    def _iterate(self, segments: list[Segment], tables: list[Sequence[int]], work: list[Work]) -> list[Result]:
        """On the compute thread."""
        tokens = [token for item in work for token in item.tokens]
        sampled = [at for at, item in enumerate(work) if item.sampling is not None]
        rows = [segments[at].row + segments[at].tokens - 1 for at in sampled]
        scored_rows = [
            segment.row + place
            for segment, item in zip(segments, work, strict=True)
            if item.scoring is not None
            for place in range(len(item.scoring.targets))
        ]
        ends = [segments[at].past + segments[at].tokens for at in sampled]
        masks = self._masker.start([work[at].guide for at in sampled])
        with torch.inference_mode():
            try:
                logits = _forward(self._model, self._pool, tokens, segments, tables, rows + scored_rows)
            except CutShort:
                masks()  # nobody may be at the guides when they are asked for again
                raise
            result = [Result()] * len(work)
            chosen = self._choose(logits[: len(rows)], [work[at] for at in sampled], ends, masks())
            for at, one in zip(sampled, follow(chosen, [work[at].guide for at in sampled]), strict=True):
                result[at] = one
            if scored_rows:
                result = add_scores(result, work, logits[len(rows) :].cpu().numpy())
            if self._device.type == "cuda":
                # Copies run on a stream of their own and may start as soon as this returns.
                torch.cuda.synchronize(self._device)
        return result

    def _choose(
        self, logits: torch.Tensor, work: list[Work], positions: list[int], masks: Sequence[Mask | None]
    ) -> list[Result]:
        """What follows each item, from its row of ``logits``; its token is the one at its position."""
        rows = [
            Row(item.sampling, position, item.emitted, item.history, mask)
            for item, position, mask in zip(work, positions, masks, strict=True)
            if item.sampling is not None
        ]
        if self._device.type != "cpu" and all(map(is_plain_greedy, rows)):
            return [Result(int(token)) for token in logits.argmax(dim=-1).tolist()]  # the rows stay on the device
        return choose(logits.cpu().numpy(), rows)

    # --- blocks -------------------------------------------------------------------------------------------

    def cut(self) -> None:
        if isinstance(self._model, HostModel):  # an accelerator's iterations are short
            self._model.cut()

    def attach(self, memory: memoryview) -> None:
        self._pool.attach(memory)

    async def pack(self, sequence: SequenceId, start: int, tokens: int, outs: Sequence[memoryview]) -> None:
        it = self._sequences[sequence]
        assert start + tokens <= it.length, "packing tokens that are not there"
        cuts = self._cuts(it, start, tokens, outs)
        await self._detached(self._on(self._copy, partial(self._pool.pack, cuts)), [it])

    async def unpack(self, sequence: SequenceId, start: int, tokens: int, blocks: Sequence[memoryview]) -> None:
        it = self._sequences[sequence]
        assert start == it.length, "unpacking anywhere but at the end"
        assert start + tokens <= len(it.table) * self._block_tokens, "over the sequence's capacity"
        cuts = self._cuts(it, start, tokens, blocks)

        async def copy() -> None:
            await self._on(self._copy, partial(self._pool.unpack, cuts))
            it.length = start + tokens

        await self._detached(copy(), [it])

    def _cuts(self, it: _Sequence, start: int, tokens: int, views: Sequence[memoryview]) -> list[Cut]:
        assert start % self._block_tokens == 0
        assert tokens > 0
        cuts: list[Cut] = []
        for offset, view in zip(range(0, tokens, self._block_tokens), views, strict=True):
            block = it.table[(start + offset) // self._block_tokens]
            count = min(self._block_tokens, tokens - offset)
            view = view.cast("B")
            assert len(view) == count * self._info.layout.token_bytes, "a view is not as long as its block"
            cuts.append(Cut(block * self._block_tokens, count, view))
        return cuts

    # --- threads ------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        while self._under_way:
            await asyncio.wait(self._under_way)
        await asyncio.to_thread(self._compute.shutdown)
        await asyncio.to_thread(self._copy.shutdown)
        if isinstance(self._model, HostModel):
            await asyncio.to_thread(self._model.close)
        await asyncio.to_thread(self._masker.close)
        await asyncio.to_thread(self._grammars.close)
        self._sequences.clear()

    async def _on(self, threads: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, function)

    async def _detached(self, call: Coroutine[Any, Any, T], items: list[_Sequence]) -> T:
        """Await ``call``; if the waiter is cancelled the call still ends, and only then may its memory be reused."""
        for it in items:
            it.busy += 1
        task = asyncio.get_running_loop().create_task(call)
        self._under_way.add(task)

        def ended(done: asyncio.Task[T]) -> None:
            self._under_way.discard(done)
            for it in items:
                it.busy -= 1
                if it.closed and it.busy == 0:
                    self._space.release(it.table)
            if not done.cancelled():
                done.exception()  # seen here, in case nobody waits any more

        task.add_done_callback(ended)
        return await asyncio.shield(task)

    def _blocks(self, tokens: int) -> int:
        assert tokens >= 0
        return max(1, -(-tokens // self._block_tokens))


# --- loading ------------------------------------------------------------------------------------------------


def _load(config: TorchEngineConfig, progress: Progress | None) -> tuple[EngineInfo, AnyModel, KVPool, Grammars]:
    """On the compute thread, so that torch's own threads are set up for it."""
    cache_dir = default_cache_dir() if config.cache_dir is None else Path(config.cache_dir)
    source = resolve(config.model, cache_dir, progress)
    source = msgspec.structs.replace(source, name=config.name or source.name)
    device, dtype = _device(config.device), _DTYPES[config.dtype]
    torch.set_num_threads(config.threads)
    if device.type == "cpu":
        _keep_heap()
    int8 = config.weights == "int8"
    if int8 and not (device.type == "cpu" and is_supported(read_config(source), dtype)):
        raise SourceError(f"{source.name}: int8 weights need the CPU's compiled kernels, which do not run this")
    with torch.inference_mode():
        weights = kept_weights(source, dtype, device, cache_dir / "kept", int8=int8)
        shape = weights.config
        layout = KVLayout(
            model=f"{config.pool and config.pool + ':'}{source.architecture}@{weights.revision}",
            dtype=config.dtype,
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            element_bytes=dtype.itemsize,
            block_tokens=config.block_tokens,
        )
        tokens_max = config.kv_tokens_max // config.block_tokens * config.block_tokens
        info = _info(source.name, layout, shape, tokens_max, hardware(device, config.threads))
        try:
            model, pool = _model_and_pool(weights, layout, tokens_max, dtype, device, config.threads)
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            need = tokens_max * layout.token_bytes / 1e9
            raise SourceError(f"no memory for {tokens_max} tokens of KV ({need:.1f} GB): {error}") from error
        _warm_up(model, pool, min(_warm_up_tokens(model), tokens_max, shape.context_max), layout)
        _trim_heap()
        # Read only when a step needs it: most need no grammar.
        grammars = Grammars(lambda: vocabulary(*_tokenizer(source), info.vocab_size))
        return info, model, pool, grammars


def _model_and_pool(
    weights: Weights, layout: KVLayout, tokens_max: int, dtype: torch.dtype, device: torch.device, threads: int
) -> tuple[AnyModel, KVPool]:
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise SourceError("a CUDA device needs Triton: pip install triton")
        from tracehaul.engine.paged_kernels import KERNELS

        paged = PagedPool(layout, tokens_max // layout.block_tokens, dtype, device)
        return PagedModel(weights, paged.tensor, KERNELS, cuda_capture()), paged
    compiled = is_supported(weights.config, dtype)
    return HostModel(weights, threads) if compiled else Model(weights), HostPool(layout, tokens_max, dtype)


def _forward(
    model: AnyModel,
    pool: KVPool,
    tokens: Sequence[int],
    segments: Sequence[Segment],
    tables: Sequence[Sequence[int]],
    rows: Sequence[int],
) -> torch.Tensor:
    if isinstance(model, PagedModel):
        return model.forward(tokens, segments, tables, rows)
    return model.forward(tokens, segments, pool.tensor, rows)


def _warm_up_tokens(model: AnyModel) -> int:
    match model:
        case PagedModel():
            return 4 * WARM_UP_TOKENS
        case HostModel():
            return WARM_UP_COMPILED_TOKENS
        case _:
            return WARM_UP_TOKENS


def _warm_up(model: AnyModel, pool: KVPool, tokens: int, layout: KVLayout) -> None:
    """A chunk, a decode step and copies on memory that nobody has yet: kernels are chosen and scratch memory is touched
    now, not in the first request."""
    tables = [range(-(-tokens // layout.block_tokens))]
    chunk = tokens - 1
    while chunk:
        _forward(model, pool, [0] * chunk, [Segment(row=0, tokens=chunk, base=0, past=0)], tables, [chunk - 1])
        # The fewer tokens, the more parts a GPU splits the context into, each number by a kernel of its own.
        chunk = chunk // 2 if isinstance(model, PagedModel) else 0
    _forward(model, pool, [0], [Segment(row=0, tokens=1, base=0, past=tokens - 1)], tables, [0])
    for part in {layout.block_tokens, max(1, layout.block_tokens - 1)}:
        cuts = [Cut(0, part, memoryview(bytearray(part * layout.token_bytes)))]
        pool.pack(cuts)
        pool.unpack(cuts)


def _tokenizer(source: ModelSource) -> tuple[str, Sequence[int]]:
    """As ``tokenizer.json`` has it, and its end tokens."""
    from tracehaul.model.text import Text  # 5 MB of libraries that a worker without grammars does not use

    text = Text.load(source)
    return text.serialized(), text.eos_tokens


def _info(name: str, layout: KVLayout, shape: ModelConfig, tokens_max: int, hardware: str) -> EngineInfo:
    if tokens_max == 0:
        raise SourceError("the KV memory is smaller than one block")
    return EngineInfo(
        model=name,
        layout=layout,
        context_max=shape.context_max,
        kv_tokens_max=tokens_max,
        vocab_size=shape.vocab_size,
        hardware=hardware,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SourceError(f"there is no such device as {name}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SourceError(f"device {name} was asked for, but torch sees no CUDA device")
    if device.type not in ("cpu", "cuda"):
        raise SourceError(f"device {name} is not supported (supported: cpu, cuda)")
    return device


def _keep_heap() -> None:
    """Let the C library keep freed memory up to 32 MiB a piece instead of returning it to the system.

    An iteration's temporaries are a few megabytes each; page-faulting them in anew costs more than computing them
    (a normalization over 512 tokens takes 0.8 ms instead of 0.1). Other C libraries ignore this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 32 << 20)
        mallopt(m_trim_threshold, 1 << 30)


def _trim_heap() -> None:
    """Return to the system what loading has left between the weights: megabytes that no iteration needs."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
