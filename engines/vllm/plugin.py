"""tracehaul's store behind vLLM's KV connector interface (V1), loaded by ``kv_connector_module_path``.

What a step computes is published while the next ones run, and no step waits for that: it is read where it is, or, on a
GPU, copied at the step's end. What finds no room is dropped. What the store has of a new prompt is loaded while other
requests run, but for on a CPU, where the step that computes the rest of it waits for it: there nothing runs beside
anything.
"""

# vLLM is not where this is checked.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)

from engines.blocks.config import EngineRefused, config_of
from engines.blocks.identity import shard
from engines.blocks.signatures import check
from engines.blocks.store import EngineStore
from engines.vllm.chains import Move, of_rank
from engines.vllm.paging import Pages, layers_of, order_of, prove
from engines.vllm.saving import Saving
from engines.vllm.scheduling import Scheduling, fresh
from tracehaul.runtime.log import Log
from tracehaul.wire.hashing import KVLayout
from tracehaul.wire.ids import BlockHash

log = Log(__name__)

TESTED = "vLLM 0.32"
LOAD_THREADS = 2
STEP_WAIT_S = 2.0
"""The longest that all loads of a step take where it waits for them."""
_NOBODY = BlockHash(b"")
SPECS = ("FullAttentionSpec", "MLAAttentionSpec")
"""Kinds of KV cache whose every block holds all of its tokens for as long as the request runs."""
SIGNATURES = {
    "__init__": ("vllm_config", "role", "kv_cache_config"),
    "register_kv_caches": ("kv_caches",),
    "handle_preemptions": ("kv_connector_metadata",),
    "start_load_kv": ("forward_context", "kwargs"),
    "wait_for_layer_load": ("layer_name",),
    "save_kv_layer": ("layer_name", "kv_layer", "attn_metadata", "kwargs"),
    "wait_for_save": (),
    "get_finished": ("finished_req_ids",),
    "get_block_ids_with_load_errors": (),
    "get_handshake_metadata": (),
    "shutdown": (),
    "get_num_new_matched_tokens": ("request", "num_computed_tokens"),
    "update_state_after_alloc": ("request", "blocks", "num_external_tokens"),
    "build_connector_meta": ("scheduler_output",),
    "bind_kv_cache_manager": ("kv_cache_manager",),
    "update_connector_output": ("connector_output",),
    "request_finished": ("request", "block_ids"),
    "set_xfer_handshake_metadata_pp_aware": ("metadata",),
}


@dataclass
class Moves(KVConnectorMetadata):
    """What one step loads and saves, and which blocks it writes to from their beginning on."""

    loads: list[Move] = field(default_factory=list[Move])
    saves: list[Move] = field(default_factory=list[Move])
    fresh: list[int] = field(default_factory=list[int])


@dataclass
class Identity(KVConnectorHandshakeMetadata):
    """What a worker says to the scheduler of its blocks: only it knows what their bytes are."""

    layout: KVLayout


class TracehaulConnector(KVConnectorBase_V1):
    """One of the scheduler, and one of each worker; see docs/engines.md."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Raises:
        EngineRefused: this vLLM or its configuration does not fit.
        """
        self._version = str(getattr(vllm, "__version__", "of no version"))
        check(f"vLLM {self._version}", TESTED, KVConnectorBase_V1, SIGNATURES)
        super().__init__(vllm_config, role, kv_cache_config)
        transfer, cache = vllm_config.kv_transfer_config, vllm_config.cache_config
        self._config = config_of(transfer.kv_connector_extra_config)
        _refuse_what_is_not_served(vllm_config, kv_cache_config)
        self._reads, self._writes = transfer.is_kv_consumer, transfer.is_kv_producer
        self._tokens = cache.block_size
        # vLLM begins loads that it does not wait for once it has launched the forward pass: on a CPU that is its end.
        # Of several ranks one may miss what the others have, and all compute on it: there a request waits, too.
        self._later = vllm_config.device_config.device_type != "cpu" or _ranks(vllm_config) > 1
        self._store: EngineStore | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduling = Scheduling(self._tokens, self._config.timeout_s, reads=self._reads, later=self._later)
        else:
            self._worker_starts()

    @property
    def requires_kv_delivery(self) -> bool:
        """No: what is not saved is computed anew."""
        return False

    def shutdown(self) -> None:
        """The engine ends."""
        if self._role is not KVConnectorRole.SCHEDULER:
            self._loading.shutdown(wait=False, cancel_futures=True)
        if self._store is not None:
            self._store.close()

    # --- in the scheduler ---------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], Any]) -> None:
        """Each worker's identity: from now on the scheduler can look for blocks."""
        layouts = [metadata[rank].layout for rank in sorted(metadata)]
        # The scheduler only asks: it needs no memory to speak of.
        config = msgspec.structs.replace(self._config, staging_bytes=0)
        self._store = EngineStore(config, layouts[0], 0, "scheduler")
        self._scheduling.joined(self._store, [layout.root() for layout in layouts])

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens of the prompt that the store has beyond those; None while that is asked."""
        return self._scheduling.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Where a request's blocks are, and whether to load the next of them."""
        self._scheduling.allocated(request, list(blocks.get_block_ids()[0]), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Moves:
        """What workers load and save with the step."""
        loads, saves = self._scheduling.step(scheduler_output, saving=self._writes)
        return Moves(loads, saves, fresh(scheduler_output, loads, self._tokens))

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """The scheduler's own index of its blocks.

        Raises:
            EngineRefused: it does not forget blocks as is expected.
        """
        check(f"vLLM {self._version}", TESTED, type(kv_cache_manager), {"evict_blocks": ("block_ids",)})
        super().bind_kv_cache_manager(kv_cache_manager)
        self._cached = kv_cache_manager

    def update_connector_output(self, connector_output: Any) -> None:
        """What a step could not load. vLLM computes it again for the request that needed it, but has it in its index
        from when the step was scheduled: were that request to leave, others would find it there."""
        failed: set[int] = connector_output.invalid_block_ids
        if failed:
            self._cached.evict_blocks(self._scheduling.failed(failed))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks may be freed: what is saved of them is read before they change, or not published."""
        self._scheduling.finished(request.request_id)
        return False, None

    # --- in a worker --------------------------------------------------------------------------------------

    def _worker_starts(self) -> None:
        self._loading = ThreadPoolExecutor(LOAD_THREADS, "tracehaul-load")
        self._lock = threading.Lock()
        self._spoilt: set[str] = set()
        """Requests that this step computes on what is not there."""
        self._loaded: set[str] = set()
        self._failed: set[int] = set()

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Look at the caches, prove that blocks are where they are expected, and join.

        Raises:
            EngineRefused: they cannot be served.
        """
        config, blocks = self._config, self._kv_cache_config.num_blocks
        layers = layers_of(kv_caches, blocks)
        order = order_of(self._version, self._vllm_config, kv_caches, config.backends)
        self._pages = Pages(layers)
        prove(self._pages, blocks)
        self._layout = self._layout_of(kv_caches, order)
        # Of the first rank all is the same but which part it has; ranks of other stages have other layers.
        self._first = self._layout.root() if self._layout.shard.startswith("0/") and self._stage == 0 else _NOBODY
        parallel = self._vllm_config.parallel_config
        alone = _ranks(self._vllm_config) == 1
        nbytes = self._pages.nbytes
        self._store = EngineStore(config, self._layout, nbytes, "" if alone else str(parallel.rank))
        self._saving = Saving(self._store)
        log.info("blocks", root=self._store.root.hex(), order=order, block_bytes=nbytes)

    def _layout_of(self, kv_caches: dict[str, Any], order: str) -> KVLayout:
        parallel, model = self._vllm_config.parallel_config, self._vllm_config.model_config
        spec = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec
        tp = parallel.tensor_parallel_size
        self._stage = parallel.rank // tp
        self._writer = not model.use_mla or parallel.rank % tp == 0
        dtype = str(next(iter(kv_caches.values())).dtype).removeprefix("torch.")
        return KVLayout(
            model=f"{self._config.model or model.model}@{self._config.revision}",
            dtype=dtype,
            layers=len(kv_caches),
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_size,
            element_bytes=next(iter(kv_caches.values())).element_size(),
            block_tokens=self._tokens,
            shard=shard(parallel.rank % tp, tp, self._stage, parallel.pipeline_parallel_size, replicated=model.use_mla),
            order=order,
            scales="revision" if "fp8" in str(self._vllm_config.cache_config.cache_dtype) else "",
        )

    def get_handshake_metadata(self) -> Identity:
        """For the scheduler."""
        return Identity(self._layout)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """A step begins: what it writes to is not what was there, and perhaps still on its way to the store."""
        if self._store is not None:
            self._saving.changes(kv_connector_metadata.fresh)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin what the step asks for. Where the step's forward pass needs it, all of it has ended on return."""
        moves: list[Move] = self._get_connector_metadata().loads
        if self._later:
            for move in moves:
                self._loading.submit(self._load, move, self._config.timeout_s)
            return
        store = self._store
        assert store is not None, "its caches were registered"
        until_s = store.now_s() + min(STEP_WAIT_S, self._config.timeout_s)
        self._spoilt = {move.request for move in moves if not self._load(move, until_s - store.now_s())}

    def _load(self, move: Move, timeout_s: float) -> bool:
        """Whether all of it is there."""
        assert self._store is not None
        goods: list[bool] = []
        try:
            pages = [self._pages.of(block) for block in move.block_ids]
            goods = self._store.get(self._mine(move.keys), pages, timeout_s)
        except Exception as error:
            log.error("blocks could not be loaded", error=error)
        goods += [False] * (len(move.block_ids) - len(goods))
        with self._lock:
            self._failed.update(block for block, good in zip(move.block_ids, goods, strict=True) if not good)
            if self._later:
                self._loaded.add(move.request)
        return all(goods)

    def _mine(self, keys: list[BlockHash]) -> list[BlockHash]:
        """This rank's parts of the blocks that the first rank calls so."""
        root = self._layout.root()
        return [of_rank(root, self._first, key) for key in keys]

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request runs when all of its loads have ended."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: a block goes with all its layers."""

    def wait_for_save(self) -> None:
        """Publish what the step has filled, as much as there is room for, while others run."""
        if self._store is None or not self._writer:
            return
        for move in self._get_connector_metadata().saves:
            if move.request in self._spoilt:
                continue  # it is computed again, and what that fills must not be shared
            pages = [self._pages.of(block) for block in move.block_ids]
            self._saving.save(move, self._mine(move.keys), self._mine(move.parents), pages)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads have ended, well or not."""
        with self._lock:
            loaded, self._loaded = self._loaded, set()
        return None, loaded or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that the store did not deliver: vLLM computes them."""
        with self._lock:
            failed, self._failed = self._failed, set()
        return failed


def _ranks(vllm_config: Any) -> int:
    parallel = vllm_config.parallel_config
    return parallel.tensor_parallel_size * parallel.pipeline_parallel_size


def _refuse_what_is_not_served(vllm_config: Any, kv_cache_config: Any) -> None:
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    if transfer.kv_load_failure_policy != "recompute":
        raise EngineRefused('tracehaul: set "kv_load_failure_policy": "recompute": what a store lost is no error')
    for what in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, what, 1) != 1:
            raise EngineRefused(f"tracehaul: {what} above 1 is not served")
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise EngineRefused("tracehaul: --calculate-kv-scales is not served: other servers have other scales")
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if len(groups) != 1 or kinds[0] not in SPECS:
        raise EngineRefused(f"tracehaul: hybrid models are not served: this one's KV caches are {', '.join(kinds)}")
