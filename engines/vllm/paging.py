"""vLLM's KV cache as pages: a block is what every layer has at one index; and what its bytes are."""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from engines.blocks.config import EngineRefused
from engines.blocks.pages import HostPage, Page

FORM = 1
"""Of what a block's bytes are here; changes with it."""
VERIFIED = ("CPU_ATTN",)
"""Attention back ends whose blocks were moved between two servers with equal tokens."""


class Pages:
    """All blocks of one rank: a block is its part of each layer, one after the other, as the layer has it."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self._layers = layers
        self._on_host = all(_is_bytes_of_host(layer) for layer in layers)
        self._bases = np.array([layer.data_ptr() for layer in layers], dtype=np.uint64)
        self._strides = np.array([layer.stride(0) * layer.element_size() for layer in layers], dtype=np.uint64)
        self._sizes = np.array([layer[0].numel() * layer.element_size() for layer in layers], dtype=np.uint64)
        self.nbytes = int(self._sizes.sum())
        """Of a block."""

    def of(self, block: int) -> Page:
        """One of them."""
        if self._on_host:
            return HostPage(self._bases + np.uint64(block) * self._strides, self._sizes, self._layers)
        return TensorPage([layer[block] for layer in self._layers])


def _is_bytes_of_host(layer: torch.Tensor) -> bool:
    return layer.device.type == "cpu" and layer.dtype == torch.uint8 and layer[0].is_contiguous()


class TensorPage:
    """One block, wherever its tensors are."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self._parts = parts
        self.nbytes = sum(part.numel() * part.element_size() for part in parts)

    def save(self, into: memoryview) -> None:
        for kept, part in self._beside(into):
            kept.copy_(part)

    def load(self, source: memoryview) -> None:
        for kept, part in self._beside(source):
            part.copy_(kept)

    def _beside(self, memory: memoryview) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        at = 0
        for part in self._parts:
            kept = torch.frombuffer(memory, dtype=part.dtype, count=part.numel(), offset=at).view(part.shape)
            pairs.append((kept, part))
            at += part.numel() * part.element_size()
        return pairs


def layers_of(kv_caches: Mapping[str, Any], blocks: int) -> list[torch.Tensor]:
    """Each layer by block.

    Raises:
        EngineRefused: it is not known where a block of a layer is.
    """
    layers: list[torch.Tensor] = []
    for name, cache in kv_caches.items():
        if not isinstance(cache, torch.Tensor) or cache.dim() < 2 or cache.shape[0] % blocks:
            raise EngineRefused(f"tracehaul: the KV cache of {name} is not cut into {blocks} blocks")
        # A kernel's blocks may be smaller than the scheduler's: those of one block follow each other.
        layer = cache if cache.shape[0] == blocks else cache.unflatten(0, (blocks, -1))
        # Bits, not numbers: what no number has must survive a copy, too.
        layers.append(layer.view(torch.uint8) if layer.stride(-1) == 1 else layer)
    if not layers:
        raise EngineRefused("tracehaul: this rank has no KV cache")
    return layers


def order_of(version: str, vllm_config: Any, kv_caches: Mapping[str, torch.Tensor], vouched: Sequence[str]) -> str:
    """What the bytes of a block are, in one line.

    Raises:
        EngineRefused: a layer's back end was not verified.
    """
    context = vllm_config.compilation_config.static_forward_context
    backends = sorted({context[name].get_attn_backend().get_name() for name in kv_caches})
    for backend in backends:
        if backend not in (*VERIFIED, *vouched):
            raise EngineRefused(
                f"tracehaul: the attention back end {backend} was not verified (these were: {', '.join(VERIFIED)})"
            )
    shapes = {f"{list(cache.shape[1:])}/{list(cache.stride()[1:])}": None for cache in kv_caches.values()}
    minor = ".".join(version.split(".")[:2])
    device = next(iter(kv_caches.values())).device.type
    return f"vllm/{FORM} {minor} {'+'.join(backends)} {device}{_packing(vllm_config, device)} {'+'.join(shapes)}"


def _packing(vllm_config: Any, device: str) -> str:
    """On a CPU the instruction set decides how keys lie in a block."""
    if device != "cpu":
        return ""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # pyright: ignore

    model, cache = vllm_config.model_config, vllm_config.cache_config
    return "/" + _get_attn_isa(model.dtype, cache.block_size, model.get_head_size(), cache.cache_dtype)


def prove(pages: Pages, blocks: int) -> None:
    """That a block written is that block, and no other. Nothing uses the cache yet.

    Raises:
        EngineRefused: it is not.
    """
    if blocks < 3:
        raise EngineRefused("tracehaul: a KV cache of less than three blocks")
    page, other = pages.of(blocks - 2), pages.of(blocks - 1)
    known = (torch.arange(page.nbytes) % 251).to(torch.uint8).numpy().tobytes()
    kept, beside, found, after = (bytearray(page.nbytes) for _ in range(4))
    page.save(memoryview(kept))
    other.save(memoryview(beside))
    page.load(memoryview(bytearray(known)))
    page.save(memoryview(found))
    other.save(memoryview(after))
    page.load(memoryview(kept))
    if bytes(found) != known or after != beside:
        raise EngineRefused("tracehaul: blocks of this KV cache are not where they were expected")
