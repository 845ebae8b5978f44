"""The engine on a CUDA device against that device's own limits, with random weights of an 8-billion-parameter Llama.

``gpu.copy`` and ``gpu.matmul`` are those limits, measured first: a copy within the device's memory (bytes read and
written) and a large product in bfloat16. A decode step reads all weights and all KV of its contexts once, so its ratio
is that time at ``gpu.copy`` divided by its own; a prompt's chunk is counted in operations against ``gpu.matmul``.
``gpu.attend.*`` is the attention kernel alone. ``gpu.pack`` and ``gpu.unpack`` move KV blocks between device and host,
against one pinned copy of the same bytes. Ratios of 1 cannot be had; more is better.
"""

import random
from collections.abc import Callable
from functools import partial
from itertools import cycle
from mmap import mmap
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench.common.report import Result, finish
from tracehaul.engine.kvpool import Cut
from tracehaul.engine.model import Segment
from tracehaul.engine.paged import PagedModel, cuda_capture
from tracehaul.engine.paged_attention import attend_paged, tokens_per_tile
from tracehaul.engine.paged_kernels import KERNELS
from tracehaul.engine.paged_pool import PagedPool
from tracehaul.engine.weights import LayerWeights, Weights
from tracehaul.model.model_config import LayerKind, ModelConfig
from tracehaul.runtime import clock
from tracehaul.wire.hashing import KVLayout

SHAPE = ModelConfig(
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocab_size=128_256,
    context_max=131_072,
    rope_theta=500_000.0,
    rope_scaling=None,
    norm_eps=1e-5,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tied=False,
    kinds=(LayerKind(None, True),) * 32,
)
DEVICE = torch.device("cuda")
BLOCK_TOKENS = 32
KV_TOKENS = 262_144
DECODES = {"b1.1k": (1, 1024), "b1.128k": (1, 130_000), "b8.32k": (8, 32_000), "b64.4k": (64, 4000)}
CHUNKS = {"2k": (2048, 0), "2k.at.64k": (2048, 65_536), "512.at.64k": (512, 65_536)}
"""New tokens, and tokens before them."""
COPY_BYTES = 4 << 30
MATMUL = 8192
BLOCKS_MOVED = 64
REPEATS, WARM_UPS = 20, 3
VALUE = 0.02
"""Standard deviation of all weights and KV."""

console = Console()


def timed(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median seconds of one run, to its end on the device."""
    seconds: list[float] = []
    for at in range(WARM_UPS + repeats):
        torch.cuda.synchronize()
        began_s = clock.perf_s()
        run()
        torch.cuda.synchronize()
        if at >= WARM_UPS:
            seconds.append(clock.perf_s() - began_s)
    return median(seconds)


def noise(*shape: int) -> torch.Tensor:
    """Random numbers in bfloat16, on the device."""
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).mul_(VALUE)


def random_weights(config: ModelConfig) -> Weights:
    """Of that shape."""
    c = config

    def layer(kind: LayerKind) -> LayerWeights:
        return LayerWeights(
            attention_norm=torch.ones(c.hidden, device=DEVICE),
            qkv=noise((c.heads + 2 * c.kv_heads) * c.head_dim, c.hidden),
            qkv_bias=None,
            q_norm=None,
            k_norm=None,
            out=noise(c.hidden, c.heads * c.head_dim),
            out_bias=None,
            mlp_norm=torch.ones(c.hidden, device=DEVICE),
            gate_up=noise(2 * c.intermediate, c.hidden),
            gate_up_bias=None,
            down=noise(c.hidden, c.intermediate),
            down_bias=None,
            window=kind.window,
            rope=kind.rope,
            qkv_scales=None,
            out_scales=None,
            gate_up_scales=None,
            down_scales=None,
        )

    return Weights(
        config=c,
        revision="random",
        dtype=torch.bfloat16,
        embedding=noise(c.vocab_size, c.hidden),
        layers=[layer(kind) for kind in c.kinds],
        norm=torch.ones(c.hidden, device=DEVICE),
        head=noise(c.vocab_size, c.hidden),
        embedding_scales=None,
        head_scales=None,
    )


def matrix_elements(config: ModelConfig) -> int:
    """Of all layers, and of the output layer."""
    c = config
    attention = (2 * c.heads + 2 * c.kv_heads) * c.head_dim * c.hidden
    return c.layers * (attention + 3 * c.intermediate * c.hidden) + c.vocab_size * c.hidden


def limits() -> tuple[float, float]:
    """Bytes and operations per second."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.int16, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy_s = timed(lambda: target.copy_(source))
    a, b = noise(MATMUL, MATMUL), noise(MATMUL, MATMUL)
    matmul_s = timed(lambda: a @ b)
    return 2 * COPY_BYTES / copy_s, 2 * MATMUL**3 / matmul_s


class Bench:
    """The model over its pool, filled with noise."""

    def __init__(self, copy_rate: float, matmul_rate: float) -> None:
        self.results = [
            Result("gpu.copy", copy_rate / 1e9, "GB/s"),
            Result("gpu.matmul", matmul_rate / 1e12, "TFLOP/s"),
        ]
        self._copy_rate, self._matmul_rate = copy_rate, matmul_rate
        c = SHAPE
        self._layout = KVLayout("random", "bfloat16", c.layers, c.kv_heads, c.head_dim, 2, BLOCK_TOKENS)
        self._pool = PagedPool(self._layout, KV_TOKENS // BLOCK_TOKENS, torch.bfloat16, DEVICE)
        for block in self._pool.tensor.split(64):
            block.normal_(std=VALUE)
        self._model = PagedModel(random_weights(c), self._pool.tensor, KERNELS, cuda_capture())
        self._random = random.Random(1)

    def decode(self, name: str, batch: int, context: int) -> None:
        """One token for each of ``batch`` sequences that have so many."""
        c = SHAPE
        tables = self._tables(batch, context + 1)
        segments = [Segment(row, 1, 0, context) for row in range(batch)]
        step_s = timed(lambda: self._model.forward([5] * batch, segments, tables, range(batch)))
        nbytes = 2 * matrix_elements(c) + batch * context * self._layout.token_bytes
        self._add(f"gpu.decode.{name}", step_s * 1e3, "ms", "gpu.copy", nbytes / step_s / self._copy_rate)
        spans = [(row, 1, context) for row in range(batch)]
        tile = tokens_per_tile(c.heads // c.kv_heads, True)
        attend_s = self._attend(tables, spans, tile)
        nbytes = batch * context * self._layout.token_bytes // c.layers
        self._add(f"gpu.attend.{name}", attend_s * 1e6, "us", "gpu.copy", nbytes / attend_s / self._copy_rate)

    def chunk(self, name: str, tokens: int, past: int) -> None:
        """A prompt's next tokens."""
        c = SHAPE
        tables = self._tables(1, past + tokens)
        segment = Segment(0, tokens, 0, past)
        ids = [self._random.randrange(c.vocab_size) for _ in range(tokens)]
        chunk_s = timed(lambda: self._model.forward(ids, [segment], tables, [tokens - 1]), 5)
        attending = 4 * c.heads * c.head_dim * tokens * (past + tokens / 2)
        work = 2 * (matrix_elements(c) - c.vocab_size * c.hidden) * tokens + c.layers * attending
        self._add(f"gpu.chunk.{name}", tokens / chunk_s, "tokens/s", "gpu.matmul", work / chunk_s / self._matmul_rate)
        attend_s = self._attend(tables, [(0, tokens, past)], tokens_per_tile(c.heads // c.kv_heads, False))
        self._add(f"gpu.attend.{name}", attend_s * 1e6, "us", "gpu.matmul", attending / attend_s / self._matmul_rate)

    def blocks(self) -> None:
        """Whole blocks to the host and back, to memory that the device was shown."""
        nbytes = BLOCKS_MOVED * self._layout.block_bytes
        pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        there = self._pool.tensor[:BLOCKS_MOVED].view(-1).view(torch.uint8)
        host = memoryview(mmap(-1, nbytes))
        self._pool.attach(host)
        starts = self._random.sample(range(0, KV_TOKENS, BLOCK_TOKENS), BLOCKS_MOVED)
        views = [host[at : at + self._layout.block_bytes] for at in range(0, nbytes, self._layout.block_bytes)]
        cuts = [Cut(start, BLOCK_TOKENS, view) for start, view in zip(starts, views, strict=True)]
        for name, move, copy in (
            ("pack", self._pool.pack, lambda: pinned.copy_(there, non_blocking=True)),
            ("unpack", self._pool.unpack, lambda: there.copy_(pinned, non_blocking=True)),
        ):
            limit = nbytes / timed(copy)
            self._add(f"gpu.pinned.{name}", limit / 1e9, "GB/s")
            rate = nbytes / timed(partial(move, cuts), 5)
            self._add(f"gpu.{name}", rate / 1e9, "GB/s", f"gpu.pinned.{name}", rate / limit)

    def _attend(self, tables: list[list[int]], spans: list[tuple[int, int, int]], tile: int) -> float:
        c = SHAPE
        queries = noise(sum(new for _, new, _ in spans), c.heads, c.head_dim)
        tiles = [(at, first) for at, (_, new, _) in enumerate(spans) for first in range(0, new, tile)]
        table, span, tiled = (torch.tensor(part, dtype=torch.int32, device=DEVICE) for part in (tables, spans, tiles))
        layers = [self._pool.tensor[:, layer] for layer in range(c.layers)]  # in turn, so that no cache has them
        turn = cycle(layers)
        return timed(lambda: attend_paged(queries, next(turn), table, span, tiled, tile, None))

    def _tables(self, batch: int, tokens: int) -> list[list[int]]:
        """Blocks in no order, of which no two sequences share one."""
        blocks = -(-tokens // BLOCK_TOKENS)
        free = self._random.sample(range(KV_TOKENS // BLOCK_TOKENS), batch * blocks)
        return [free[at * blocks : (at + 1) * blocks] for at in range(batch)]

    def _add(self, name: str, value: float, unit: str, versus: str | None = None, ratio: float | None = None) -> None:
        self.results.append(Result(name, value, unit, versus, ratio))
        console.print(f"{name}: {value:.4g} {unit}" + ("" if ratio is None else f", {ratio:.2f} of {versus}"))


def main(json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None) -> None:
    """Measure on the first CUDA device; 60 GB of its memory are used."""
    if not torch.cuda.is_available():
        console.print("There is no CUDA device here.")
        raise typer.Exit(1)
    config: dict[str, Any] = {"device": torch.cuda.get_device_name(), "kv_tokens": KV_TOKENS}
    with torch.inference_mode():
        bench = Bench(*limits())
        for name, (batch, context) in DECODES.items():
            bench.decode(name, batch, context)
        for name, (tokens, past) in CHUNKS.items():
            bench.chunk(name, tokens, past)
        bench.blocks()
    finish(config, bench.results, json, console)


if __name__ == "__main__":
    typer.run(main)
