"""Modules with the names and shapes of the engines' own: SGLang 0.5.23 and vLLM 0.32, as their sources have them."""

import enum
import sys
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


def install(patch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module, and what it is in."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        above = ".".join(parts[:end])
        if above not in sys.modules:
            patch.setitem(sys.modules, above, ModuleType(above))
    module = ModuleType(name)
    vars(module).update(contents)
    patch.setitem(sys.modules, name, module)


# --- SGLang -------------------------------------------------------------------------------------------------


class HiCacheStorage(ABC):
    """``sglang.srt.mem_cache.hicache_storage``."""

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        self.registered = host_pool_name

    def batch_get_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> Any:
        raise NotImplementedError

    def batch_set_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> Any:
        raise NotImplementedError

    @abstractmethod
    def get(self, key: Any, target_location: Any = None, target_sizes: Any = None) -> Any: ...

    @abstractmethod
    def batch_get(self, keys: Any, target_locations: Any = None, target_sizes: Any = None) -> Any: ...

    @abstractmethod
    def set(self, key: Any, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> Any: ...

    @abstractmethod
    def batch_set(
        self, keys: Any, values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> Any: ...

    @abstractmethod
    def exists(self, key: Any) -> Any: ...

    def batch_exists(self, keys: Any, extra_info: Any = None) -> Any:
        raise NotImplementedError


class MHATokenToKVPoolHost:
    """A host pool of pages, ``page_first_direct``: ``[2, pages, layers, tokens, heads, dim]``."""

    layout = "page_first_direct"
    page_size = 4
    layer_num, head_num, head_dim = 3, 2, 8
    dtype = torch.bfloat16

    def __init__(self, pages: int = 16) -> None:
        self.size = pages * self.page_size
        shape = (2, pages, self.layer_num, self.page_size, self.head_num, self.head_dim)
        self.kv_buffer = torch.zeros(shape, dtype=self.dtype)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        span = self.layer_num * self.page_size * self.head_num * self.head_dim * self.dtype.itemsize
        base, values = self.kv_buffer.data_ptr(), self.kv_buffer[1].data_ptr()
        firsts = indices.tolist()[:: self.page_size]
        pointers = [start + first // self.page_size * span for first in firsts for start in (base, values)]
        return pointers, [span] * len(pointers)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        shape = (2, 1, self.layer_num, self.page_size, self.head_num, self.head_dim)
        at = index // self.page_size
        self.kv_buffer[:, at : at + 1] = data_page.reshape(shape)


def storage_config(extra: dict[str, Any], **changes: Any) -> SimpleNamespace:
    """``HiCacheStorageConfig``."""
    said: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "model_name": "m",
        "should_split_heads": False,
        "dcp_size": 1,
        "extra_config": {"interface_v1": 1, **extra},
    }
    return SimpleNamespace(**{**said, **changes})


def install_sglang(patch: pytest.MonkeyPatch) -> None:
    install(patch, "sglang", __version__="0.5.23")
    install(patch, "sglang.srt.mem_cache.hicache_storage", HiCacheStorage=HiCacheStorage)
    patch.delitem(sys.modules, "engines.sglang.plugin", raising=False)


# --- vLLM ---------------------------------------------------------------------------------------------------


class KVConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class KVConnectorMetadata(ABC):  # noqa: B024 - as it is there
    pass


class KVConnectorHandshakeMetadata(ABC):  # noqa: B024
    pass


class KVConnectorBase_V1(ABC):
    """``vllm.distributed.kv_transfer.kv_connector.v1.base``."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._connector_metadata: Any = None
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._role = role

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        self._connector_metadata = connector_metadata

    def _get_connector_metadata(self) -> Any:
        assert self._connector_metadata is not None
        return self._connector_metadata

    def register_kv_caches(self, kv_caches: Any) -> None:
        raise NotImplementedError

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        raise NotImplementedError

    @abstractmethod
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    @abstractmethod
    def wait_for_layer_load(self, layer_name: str) -> None: ...

    @abstractmethod
    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...

    @abstractmethod
    def wait_for_save(self) -> None: ...

    def get_finished(self, finished_req_ids: Any) -> Any:
        raise NotImplementedError

    def get_block_ids_with_load_errors(self) -> Any:
        raise NotImplementedError

    def shutdown(self) -> None:
        raise NotImplementedError

    def get_handshake_metadata(self) -> Any:
        raise NotImplementedError

    @abstractmethod
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any: ...

    @abstractmethod
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> Any: ...

    @abstractmethod
    def build_connector_meta(self, scheduler_output: Any) -> Any: ...

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        self._kv_cache_manager = kv_cache_manager

    def update_connector_output(self, connector_output: Any) -> None:
        return

    def request_finished(self, request: Any, block_ids: Any) -> Any:
        raise NotImplementedError

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Any) -> None:
        raise NotImplementedError


class KVCacheManager:
    """``vllm.v1.core.kv_cache_manager``, as far as it forgets."""

    def __init__(self) -> None:
        self.evicted: set[int] = set()

    def evict_blocks(self, block_ids: set[int]) -> None:
        self.evicted |= block_ids


class FullAttentionSpec:
    num_kv_heads, head_size = 2, 8


class MambaSpec:
    pass


def _isa(dtype: Any, block_size: int, head_size: int, kv_cache_dtype: str) -> str:
    return "vec"


def install_vllm(patch: pytest.MonkeyPatch) -> None:
    install(patch, "vllm", __version__="0.32.0")
    base = {
        "KVConnectorBase_V1": KVConnectorBase_V1,
        "KVConnectorHandshakeMetadata": KVConnectorHandshakeMetadata,
        "KVConnectorMetadata": KVConnectorMetadata,
        "KVConnectorRole": KVConnectorRole,
    }
    install(patch, "vllm.distributed.kv_transfer.kv_connector.v1.base", **base)
    install(patch, "vllm.v1.attention.backends.cpu_attn", _get_attn_isa=_isa)
    patch.delitem(sys.modules, "engines.vllm.plugin", raising=False)


def vllm_config(
    extra: dict[str, Any], layers: list[str], backend: str = "CPU_ATTN", device: str = "cuda", **parallel: Any
) -> SimpleNamespace:
    """``VllmConfig``, as far as a connector looks at it."""
    layer = SimpleNamespace(get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend))
    sizes = {"rank": 0, "tensor_parallel_size": 1, "pipeline_parallel_size": 1, **parallel}
    model = SimpleNamespace(model="m", dtype=torch.bfloat16, use_mla=False, get_head_size=lambda: 8)
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config=extra,
            kv_load_failure_policy="recompute",
            is_kv_consumer=True,
            is_kv_producer=True,
        ),
        cache_config=SimpleNamespace(block_size=4, cache_dtype="auto", calculate_kv_scales=False),
        parallel_config=SimpleNamespace(**sizes),
        device_config=SimpleNamespace(device_type=device),
        model_config=model,
        compilation_config=SimpleNamespace(static_forward_context=dict.fromkeys(layers, layer)),
    )


def cache_config(blocks: int, *specs: Any) -> SimpleNamespace:
    """``KVCacheConfig``."""
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs or (FullAttentionSpec(),)]
    return SimpleNamespace(num_blocks=blocks, kv_cache_groups=groups)
