"""tracehaul's store as SGLang's third tier: a HiCache storage back end, loaded by ``dynamic``, interface v1.

SGLang names a page by a SHA-256 chained over its tokens from the salt of its request, adapter included; the root makes
that a block of this model, revision, layout and rank. A page is one block, however many pieces it has in the host pool.
"""

# SGLang is not where this is checked.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sglang
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from engines.blocks.config import EngineRefused, config_of
from engines.blocks.identity import shard
from engines.blocks.pages import HostPage
from engines.blocks.signatures import check
from engines.blocks.store import EngineStore
from tracehaul.runtime.log import Log
from tracehaul.wire.hashing import KVLayout, named
from tracehaul.wire.ids import BlockHash
from tracehaul.wire.naming import SGLANG

log = Log(__name__)

TESTED = "SGLang 0.5.23"
FORM = 1
"""Of what a page's bytes are here; changes with it."""
VERIFIED = ("MHATokenToKVPoolHost",)
"""Host pools whose pages were moved between two servers with equal tokens."""
LAYOUTS = ("page_first_direct", "page_first")
"""Those in which a page's pieces are whole pages of keys and of values."""
SIGNATURES = {
    "register_mem_pool_host": ("mem_pool_host",),
    "register_mem_host_pool_v2": ("host_pool", "host_pool_name"),
    "batch_get_v1": ("keys", "host_indices", "extra_info"),
    "batch_set_v1": ("keys", "host_indices", "extra_info"),
    "batch_exists": ("keys", "extra_info"),
    "exists": ("key",),
    "get": ("key", "target_location", "target_sizes"),
    "set": ("key", "value", "target_location", "target_sizes"),
    "batch_get": ("keys", "target_locations", "target_sizes"),
    "batch_set": ("keys", "values", "target_locations", "target_sizes"),
}


class TracehaulStorage(HiCacheStorage):
    """What ``--hicache-storage-backend dynamic`` is given as ``class_name``; see docs/engines.md."""

    def __init__(self, storage_config: Any, kwargs: Mapping[str, Any]) -> None:
        """Raises:
        EngineRefused: this SGLang or its configuration does not fit.
        """
        engine = f"SGLang {getattr(sglang, '__version__', 'of no version')}"
        check(engine, TESTED, HiCacheStorage, SIGNATURES)
        extra = storage_config.extra_config
        self._config = config_of(extra)
        if not (extra or {}).get("interface_v1"):
            raise EngineRefused('tracehaul: the extra configuration needs "interface_v1": 1')
        self._storage = storage_config
        for what in ("attn_cp_size", "dcp_size"):
            if getattr(storage_config, what, 1) not in (None, 1):
                raise EngineRefused(f"tracehaul: {what} above 1 is not served")
        if storage_config.should_split_heads:
            raise EngineRefused("tracehaul: tp_lcm_size is not served: a page is of one size of tensor parallelism")

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Look at the pool, prove that its pages are what they are taken for, and join.

        Raises:
            EngineRefused: it cannot be served.
        """
        super().register_mem_pool_host(mem_pool_host)
        pool, config, storage = mem_pool_host, self._config, self._storage
        kind = type(pool).__name__
        if kind not in (*VERIFIED, *config.backends):
            raise EngineRefused(f"tracehaul: the host pool {kind} was not verified (these were: {', '.join(VERIFIED)})")
        if pool.layout not in LAYOUTS:
            raise EngineRefused(f"tracehaul: --hicache-mem-layout must be {LAYOUTS[0]}, not {pool.layout}")
        _, sizes = pool.get_page_buffer_meta(torch.arange(pool.page_size))
        self._page_bytes = sum(sizes)
        self._pieces = len(sizes)
        self._prove(kind)
        mla = storage.is_mla_model
        dtype = str(pool.dtype).removeprefix("torch.")
        layout = KVLayout(
            model=f"{config.model or storage.model_name}@{config.revision}",
            dtype=dtype,
            layers=pool.layer_num,
            kv_heads=1 if mla else pool.head_num,
            head_dim=self._page_bytes // (pool.layer_num * pool.page_size * pool.dtype.itemsize),
            element_bytes=pool.dtype.itemsize,
            block_tokens=pool.page_size,
            shard=shard(storage.tp_rank, storage.tp_size, storage.pp_rank, storage.pp_size, replicated=mla),
            order=f"sglang/{FORM} {kind} {pool.layout} {'+'.join(map(str, sizes))}",
            hashing=SGLANG,
            scales="revision" if "float8" in dtype or dtype in ("uint8", "int8") else "",
        )
        alone = storage.tp_size * storage.pp_size == 1
        rank = "" if alone else str(storage.pp_rank * storage.tp_size + storage.tp_rank)
        self._store = EngineStore(config, layout, self._page_bytes, rank)
        log.info("pages", root=self._store.root.hex(), order=layout.order, page_bytes=self._page_bytes)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """The pool of keys and values under its newer name; hybrid models have others beside it.

        Raises:
            EngineRefused: it is another pool.
        """
        if str(host_pool_name) != "kv":
            raise EngineRefused(f"tracehaul: hybrid models are not served: this one has a pool {str(host_pool_name)!r}")
        super().register_mem_host_pool_v2(host_pool, host_pool_name)

    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        """How many of the pages, from the first on, can be got."""
        return self._store.exists([self._block(key) for key in keys])

    def batch_get_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Land pages in the host pool; whether each did."""
        return self._store.get([self._block(key) for key in keys], self._pages(host_indices))

    def batch_set_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Publish pages of the host pool; whether each can be got now. On SGLang's thread for that."""
        before = extra_info.prefix_keys if extra_info is not None else None
        blocks = [self._block(key) for key in keys]
        parents = [self._block(before[-1]) if before else self._store.root, *blocks[:-1]]
        return self._store.put(blocks, parents, self._pages(host_indices))

    def exists(self, key: str) -> bool:
        """Whether a page can be got."""
        return self.batch_exists([key]) == 1

    # The interface before v1 moves tensors one by one. It is abstract in the base, and nobody calls it with v1.

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        """Nothing."""

    def batch_get(self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None) -> list[None]:
        """Nothing."""
        return [None] * len(keys)

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Nothing."""
        return False

    def batch_set(
        self, keys: Sequence[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Nothing."""
        return False

    def close(self) -> None:
        """SGLang lets go of this back end."""
        if hasattr(self, "_store"):
            self._store.close()

    def _block(self, key: str) -> BlockHash:
        return named(self._store.root, bytes.fromhex(key))

    def _pages(self, host_indices: Any) -> list[HostPage]:
        pointers, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        addresses = np.array(pointers, dtype=np.uint64).reshape(-1, self._pieces)
        lengths = np.array(sizes[: self._pieces], dtype=np.uint64)
        return [HostPage(row, lengths, self.mem_pool_host) for row in addresses]

    def _prove(self, kind: str) -> None:
        """That the pieces of the last page are the page as the pool itself has it, in its order.

        Raises:
            EngineRefused: they are not.
        """
        pool = self.mem_pool_host
        at = (pool.size // pool.page_size - 1) * pool.page_size
        (page,) = self._pages(torch.arange(at, at + pool.page_size))
        kept, known, found = bytearray(page.nbytes), _known(page.nbytes), bytearray(page.nbytes)
        page.save(memoryview(kept))
        try:
            flat = torch.frombuffer(bytearray(known), dtype=torch.uint8).view(pool.dtype)
            pool.set_from_flat_data_page(at, flat)
            page.save(memoryview(found))
        finally:
            page.load(memoryview(kept))
        if bytes(found) != known:
            raise EngineRefused(f"tracehaul: pages of {kind} in {pool.layout} are not where they were expected")


def _known(nbytes: int) -> bytes:
    """Bytes that say where they are."""
    return (torch.arange(nbytes, dtype=torch.int64) * 2654435761 // 65536 % 251).to(torch.uint8).numpy().tobytes()
