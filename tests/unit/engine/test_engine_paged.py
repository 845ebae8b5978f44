"""Paged memory: the Triton kernel (interpreted where there is no GPU), the model over it, its pool, its graphs."""

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tracehaul.engine import paged as paged_module
from tracehaul.engine import paged_attention
from tracehaul.engine.kvpool import Cut
from tracehaul.engine.model import Model, Segment
from tracehaul.engine.paged import PagedModel, cuda_capture
from tracehaul.engine.paged_attention import attend_paged, tokens_per_tile
from tracehaul.engine.paged_kernels import KERNELS
from tracehaul.engine.paged_pool import PagedPool
from tracehaul.engine.weights import Weights, load_weights
from tracehaul.model.source import resolve
from tracehaul.wire.hashing import KVLayout

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def expected_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
) -> torch.Tensor:
    """By the definition: ``[tokens, heads, head_dim]`` over ``[kv_heads, context, head_dim]``."""
    tokens, heads, head_dim = queries.shape
    context, group = keys.shape[1], heads // keys.shape[0]
    keys, values = (part.repeat_interleave(group, 0).float() for part in (keys, values))
    scores = torch.einsum("thd,hkd->htk", queries.float(), keys) * head_dim**-0.5
    at = torch.arange(context - tokens, context, device=keys.device)[:, None]
    key = torch.arange(context, device=keys.device)
    hidden = (key > at) | (key <= at - (window or context))
    return torch.einsum("htk,hkd->thd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.float16),  # the interpreter's products know no bfloat16
        pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("splits_max", [1, 4])
@pytest.mark.parametrize("window", [None, 1, 20, 500])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens"), [(9, 3, 64, 8), (4, 4, 24, 32), (8, 1, 16, 12)]
)
def test_the_kernel_attends_by_the_definition(
    device: str,
    dtype: torch.dtype,
    window: int | None,
    splits_max: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged_attention, "SPLITS_MAX", splits_max)
    torch.manual_seed(3)
    spans = [(0, 1, 75), (1, 37, 0), (38, 19, 50), (57, 1, 0)]  # first row, new tokens, tokens before them
    rows = 58
    blocks = 30
    kv = torch.full((blocks, 2, kv_heads, block_tokens, head_dim), float("nan"), dtype=dtype, device=device)
    order = torch.randperm(blocks).tolist()
    tables = torch.zeros(len(spans), 12, dtype=torch.int32, device=device)
    queries = torch.randn(rows, heads, head_dim, device=device).to(dtype)
    expected = torch.empty(rows, heads, head_dim, device=device)
    for at, (row, new, past) in enumerate(spans):
        keys, values = torch.randn(2, kv_heads, past + new, head_dim, device=device).to(dtype)
        for index, start in enumerate(range(0, past + new, block_tokens)):
            block = tables[at, index] = order.pop()
            count = min(block_tokens, past + new - start)
            kv[block, 0, :, :count] = keys[:, start : start + count]
            kv[block, 1, :, :count] = values[:, start : start + count]
        expected[row : row + new] = expected_attention(queries[row : row + new], keys, values, window)
    tile = tokens_per_tile(heads // kv_heads, False)
    tiles = [(at, first) for at, (_, new, _) in enumerate(spans) for first in range(0, new, tile)]
    placed = [torch.tensor(part, dtype=torch.int32, device=device) for part in (spans, tiles)]
    got = attend_paged(queries, kv, tables, *placed, tile, window)
    assert (got - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(architecture: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), str(architecture)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.split() == ["_combine", "_attend", "_attend", "_add_norm", "_place", "_gate"], done.stderr[
        -2000:
    ]


# --- the model ----------------------------------------------------------------------------------------------

BLOCK_TOKENS = 8
BLOCKS = 40
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TINY, head_dim=16, attention_bias=True)),
}


def tiny(name: str, folder: Path, device: torch.device = CPU) -> Weights:
    torch.manual_seed(6)
    MODELS[name]().save_pretrained(folder)
    return load_weights(resolve(str(folder)), torch.float32, device)


def layout_of(weights: Weights) -> KVLayout:
    c = weights.config
    return KVLayout(
        model="m",
        dtype="float32",
        layers=c.layers,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        element_bytes=4,
        block_tokens=BLOCK_TOKENS,
    )


def rerun(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """A capture where there are no graphs: the same computation on the same memory, again."""
    result = run()

    def again() -> None:
        result.copy_(run())

    return again, result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_logits_over_scattered_blocks_equal_those_over_a_range(
    name: str, graphs: bool, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_module, "GRAPH_BATCHES", (1, 2, 4))
    monkeypatch.setattr(paged_attention, "SPLITS_MAX", 2)  # an interpreted kernel is slow
    weights = tiny(name, tmp_path)
    c = weights.config
    place = torch.device(device)
    plain = Model(weights)
    pool = torch.zeros(c.layers, 2, c.kv_heads, 200, c.head_dim)
    capture = None if not graphs else cuda_capture() if device == "cuda" else rerun
    tables = [[7, 2, 31, 0, 5], [11, 4, 3, 29], [30]]
    with torch.inference_mode():
        paged_pool = PagedPool(layout_of(weights), BLOCKS, torch.float32, place)
        there = load_weights(resolve(str(tmp_path)), torch.float32, place)
        paged = PagedModel(there, paged_pool.tensor, KERNELS, capture)

        def both(tokens: list[list[int]], pasts: list[int], sampled: list[int]) -> None:
            row, segments = 0, list[Segment]()
            for at, (new, past) in enumerate(zip(tokens, pasts, strict=True)):
                segments.append(Segment(row, len(new), 60 * at, past))
                row += len(new)
            flat = [token for new in tokens for token in new]
            expected = plain.forward(flat, segments, pool, sampled)
            got = paged.forward(flat, segments, tables[: len(tokens)], sampled).cpu()
            assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
            assert torch.equal(got.argmax(-1), expected.argmax(-1))

        both([list(range(29)), list(range(40, 57)), [5]], [0, 0, 0], [28, 45, 46])
        both([[9, 3], [8], [6]], [29, 17, 1], [1, 3])
        for step in range(6):  # decode: three sequences padded to four, then two
            both([[step], [step + 1], [step + 2]], [31 + step, 18 + step, 2 + step], [0, 1, 2])
        both([[1], [2]], [37, 24], [0, 1])
        for token in (-1, c.vocab_size):
            with pytest.raises(IndexError):
                paged.forward([token], [Segment(0, 1, 0, 0)], [[1]], [0])


# --- the pool -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attached", [False, True])
def test_blocks_come_back_as_they_were_and_a_full_one_is_contiguous(
    attached: bool, device: str, dtype: torch.dtype
) -> None:
    layout = KVLayout("m", str(dtype), layers=3, kv_heads=2, head_dim=4, element_bytes=dtype.itemsize, block_tokens=8)
    pool = PagedPool(layout, 5, dtype, torch.device(device))
    pool.tensor.copy_(torch.randn(pool.tensor.shape))
    before = pool.tensor.cpu().clone()
    with mmap.mmap(-1, 4 * layout.block_bytes) as memory:
        buffers = [memoryview(memory)[at * layout.block_bytes :][: layout.block_bytes] for at in range(3)]
        if attached:
            pool.attach(memoryview(memory))
        cuts = [Cut(16, 8, buffers[0]), Cut(0, 3, buffers[1][: 3 * layout.token_bytes]), Cut(8, 8, buffers[2])]
        pool.pack(cuts)
        for start, tokens, packed in cuts:
            block = before[start // 8, :, :, :, :tokens].contiguous()
            assert block.view(-1).view(torch.uint8).numpy().tobytes() == packed
        pool.unpack([Cut(32, 8, cuts[0].packed), Cut(24, 3, cuts[1].packed), Cut(0, 8, cuts[2].packed)])
        after = pool.tensor.cpu()
        del buffers, cuts, packed
    assert torch.equal(after[4], before[2])
    assert torch.equal(after[3, :, :, :, :3], before[0, :, :, :, :3])
    assert torch.equal(after[3, :, :, :, 3:], before[3, :, :, :, 3:])
    assert torch.equal(after[0], before[1])
    assert torch.equal(after[[1, 2]], before[[1, 2]])
    pool.move(8, 24, 8)
    assert torch.equal(pool.tensor[1], pool.tensor[3])
    assert pool.tensor[2].is_contiguous()
    assert pool.tensor[2].nbytes == layout.block_bytes
