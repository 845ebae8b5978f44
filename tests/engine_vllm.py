"""vLLM's part of a test: a request, and what its scheduler and worker do between two connectors."""

import time  # noqa: TID251 - threads wait here, and no loop
from types import SimpleNamespace
from typing import Any

import torch

from tests import engine_stubs as stubs

BLOCKS, LAYERS = 16, ["layer.0", "layer.1"]


def request(name: str, tokens: list[int], **more: Any) -> SimpleNamespace:
    said = {"cache_salt": None, "lora_request": None, "mm_features": [], "prompt_embeds": None}
    return SimpleNamespace(request_id=name, all_token_ids=tokens, num_tokens=len(tokens), **{**said, **more})


class Engine:
    """A scheduler's and a worker's connector, and what vLLM does between them."""

    def __init__(self, plugin: Any, extra: dict[str, Any], head_dim: int = 16, **how: Any) -> None:
        """With a ``head_dim`` of 64 a block's pieces are long enough to be copied as they are."""
        self.caches = {name: torch.zeros(BLOCKS, 2, 4, head_dim, dtype=torch.bfloat16) for name in LAYERS}
        self.given: dict[str, list[int]] = {}
        config = stubs.vllm_config(extra, LAYERS, **how)
        role, blocks = stubs.KVConnectorRole, stubs.cache_config(BLOCKS)
        self.scheduler = plugin.TracehaulConnector(config, role.SCHEDULER, blocks)
        self.index = stubs.KVCacheManager()
        self.scheduler.bind_kv_cache_manager(self.index)
        self.worker = plugin.TracehaulConnector(config, role.WORKER, blocks)
        self.worker.register_kv_caches(self.caches)
        self.scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): self.worker.get_handshake_metadata()})

    def fill(self, *blocks: int) -> None:
        for cache in self.caches.values():
            for block in blocks:
                cache[block] = torch.randn(cache[block].shape).to(cache.dtype)

    def matched(self, asked: Any, computed: int = 0) -> tuple[int, bool]:
        """As the scheduler asks: again at each step, while there is no answer."""
        for _ in range(500):
            tokens, later = self.scheduler.get_num_new_matched_tokens(asked, computed)
            if tokens is not None:
                return tokens, later
            time.sleep(0.01)
        raise AssertionError("a request is parked")

    def allocate(self, asked: Any, blocks: list[int], external: int) -> None:
        self.given[asked.request_id] = blocks
        got = SimpleNamespace(get_block_ids=lambda: (blocks,))
        self.scheduler.update_state_after_alloc(asked, got, external)

    def step(self, new: dict[str, tuple[int, int]], cached: dict[str, tuple[int, int, list[int] | None]]) -> Any:
        """By request: tokens computed before, tokens of this step, and new blocks."""
        output = SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=name, num_computed_tokens=at, block_ids=(self.given[name],))
                for name, (at, _) in new.items()
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=list(cached),
                resumed_req_ids=set(),
                num_computed_tokens=[at for at, _, _ in cached.values()],
                new_block_ids=[None if blocks is None else (blocks,) for _, _, blocks in cached.values()],
            ),
            num_scheduled_tokens={name: one[1] for name, one in (*new.items(), *cached.items())},
        )
        meta = self.scheduler.build_connector_meta(output)
        self.worker.handle_preemptions(meta)
        self.worker.bind_connector_metadata(meta)
        self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        return meta

    def loaded(self, name: str) -> set[int]:
        """Waits for a request's loads; blocks that failed."""
        failed: set[int] = set()
        for _ in range(500):
            _, received = self.worker.get_finished(set())
            failed |= self.worker.get_block_ids_with_load_errors()
            if received and name in received:
                return failed
            time.sleep(0.01)
        raise AssertionError("a load does not end")

    def failed(self) -> set[int]:
        """Blocks that were not loaded; the scheduler is told of them."""
        failed = self.worker.get_block_ids_with_load_errors()
        self.scheduler.update_connector_output(SimpleNamespace(invalid_block_ids=failed))
        return failed

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()
