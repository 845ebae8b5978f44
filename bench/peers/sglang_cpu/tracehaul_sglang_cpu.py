"""Lets SGLang 0.5.23, whose wheel asks for CUDA, serve a small model on a CPU: installed beside it by scripts/peers.

Three things are missing there: kernels that it imports whether or not they are used, two operators that torchvision's
wheel has for CUDA's torch alone, and the copies between its KV cache and the host's pages. The first two are named and
do nothing; the third are written here, for ``--hicache-io-backend direct --hicache-mem-layout page_first_direct``. A
fourth is there, and wasteful: ``--attention-backend torch_native`` computes all queries of a prompt when most of it is
cached, so that a hit saves little; here, as its other back ends do, those of the new tokens alone.

``tracehaul_sglang_cpu.pth`` imports this in every process of the environment, the server's children included.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

POOLS = "sglang.srt.mem_cache.pool_host.mha"
ATTENTION = "sglang.srt.layers.attention.torch_native_backend"
FREE_BYTES = 2**30
"""Of the host's memory that a pool leaves alone; ten times that is what a GPU's host has to spare."""


def page_rows(tokens: Any, page_size: int) -> Any:
    """Pages of token slots that come in whole pages."""
    return tokens[::page_size].long() // page_size


def pages_to_cache(
    src_ptrs: Sequence[Any],
    dst_ptrs: Sequence[Any],
    src_indices: Any,
    dst_indices: Any,
    layer_id: int,
    page_size: int,
) -> None:
    """One layer of pages (page, layer, token, head, dim) into the cache's slots (slot, head, dim), keys and values."""
    rows, slots = page_rows(src_indices, page_size), dst_indices.long()
    for pages, cache in zip(src_ptrs, dst_ptrs, strict=True):
        cache[slots] = pages[rows, layer_id].flatten(0, 1)


def cache_to_pages(
    src_ptrs: Sequence[Any], dst_ptrs: Sequence[Any], src_indices: Any, dst_indices: Any, page_size: int
) -> None:
    """All layers of the cache's slots, those of keys and then those of values, into pages."""
    rows, slots = page_rows(dst_indices, page_size), src_indices.long()
    layers = len(src_ptrs) // len(dst_ptrs)
    for at, cache in enumerate(src_ptrs):
        pages = dst_ptrs[at // layers]
        pages[rows, at % layers] = cache[slots].unflatten(0, (-1, page_size))


def pin_nothing(buffer: Any, granularity_bytes: int | None = None) -> None:
    """As ``_cuda_host_register``."""


def serve_pools(module: Any) -> None:
    """Give the host's pools their copies; nothing is pinned where there is no GPU, and no 10 GB are left alone."""
    module.transfer_kv_per_layer_direct_pf_lf = pages_to_cache
    module.transfer_kv_all_layer_direct_lf_pf = cache_to_pages
    common: Any = sys.modules["sglang.srt.mem_cache.pool_host.common"]
    common._cuda_host_register = pin_nothing
    base: Any = sys.modules["sglang.srt.mem_cache.pool_host.base"]
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = FREE_BYTES


def attend(
    query: Any,
    output: Any,
    keys: Any,
    values: Any,
    tables: Any,
    rows: Sequence[int],
    lengths: Sequence[int],
    prefixes: Sequence[int],
    **how: Any,
) -> None:
    """Causal attention of each request's new tokens, all of them in ``query`` (token, head, dim), over its whole text,
    whose slots of the cache its row of ``tables`` has."""
    import torch

    begin = 0
    for row, length, prefix in zip(rows, lengths, prefixes, strict=True):
        new = length - prefix
        slots = tables[row, :length]
        here = query[begin : begin + new].movedim(0, 1)[None]
        key, value = (cache[slots].to(query.dtype).movedim(0, 1)[None] for cache in (keys, values))
        mask = torch.ones(new, length, dtype=torch.bool).tril(prefix) if prefix else None
        found = torch.nn.functional.scaled_dot_product_attention(
            here, key, value, attn_mask=mask, is_causal=mask is None, **how
        )
        output[begin : begin + new] = found[0].movedim(1, 0)
        begin += new


def serve_attention(module: Any) -> None:
    """Have its extends computed by :func:`attend`, where they are what that knows."""
    backend = module.TorchNativeAttnBackend
    before = backend._run_sdpa_forward_extend

    def extend(
        self: Any,
        query: Any,
        output: Any,
        k_cache: Any,
        v_cache: Any,
        req_to_token: Any,
        req_pool_indices: Any,
        seq_lens: Any,
        extend_prefix_lens: Any,
        extend_seq_lens: Any,
        encoder_lens: Any = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> Any:
        caches = query, output, k_cache, v_cache, req_to_token
        windowed = sliding_window_size is not None and sliding_window_size > -1
        if encoder_lens is not None or not causal or windowed:
            lengths = req_pool_indices, seq_lens, extend_prefix_lens, extend_seq_lens, encoder_lens
            return before(self, *caches, *lengths, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size)
        lists = [numbers.tolist() for numbers in (req_pool_indices, seq_lens, extend_prefix_lens)]
        attend(*caches, *lists, scale=scaling, enable_gqa=enable_gqa)
        return output

    backend._run_sdpa_forward_extend = extend


SERVED: dict[str, Callable[[Any], None]] = {POOLS: serve_pools, ATTENTION: serve_attention}


def name_operators() -> list[Any]:
    """torchvision says what its operators mean before it looks whether they are there; what is returned keeps them."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return [library]


class _Absent(Loader):
    """Any name of the module is there; whoever calls it learns that it is not."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: Any) -> None:
        module.__version__ = "0"

        def look_up(name: str) -> Callable[..., Any]:
            if name.startswith("__"):
                raise AttributeError(name)

            def missing(*_: Any, **__: Any) -> None:
                raise NotImplementedError(f"{module.__name__}.{name} is not there on a CPU")

            return missing

        module.__getattr__ = look_up


class _Finder(MetaPathFinder):
    kept: list[Any] | None = None

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == "sgl_kernel":
            return ModuleSpec(fullname, _Absent())  # no package: who asks for its parts finds none
        if fullname == "torchvision._meta_registrations" and self.kept is None:
            self.kept = name_operators()
        serve = SERVED.get(fullname)
        if serve is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                serve(module)

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
