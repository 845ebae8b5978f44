"""Servers of several ranks: each rank's part of a block is its own, and a block is there when all have theirs."""

# pyright: reportPrivateUsage=false

import importlib
import itertools
import time  # noqa: TID251 - threads wait here, and no loop
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.blocks.identity import shard
from tests import engine_stubs as stubs
from tests.engine_rig import Fleet, fleet
from tests.engine_vllm import BLOCKS, LAYERS, request
from tracehaul.wire.hashing import KVLayout


def prompt(number: int) -> list[int]:
    """Of each test its own: pools of one layout find each other's blocks."""
    return list(range(1000 * number, 1000 * number + 9))


@pytest.fixture(scope="module")
def rig() -> Iterator[Fleet]:
    with fleet() as made:
        yield made


class Ranks:
    """A server of vLLM with one scheduler and a worker for each rank, whose caches nobody else has."""

    def __init__(self, plugin: Any, extra: dict[str, Any], tp: int = 1, pp: int = 1, *, mla: bool = False) -> None:
        role, blocks = stubs.KVConnectorRole, stubs.cache_config(BLOCKS)
        sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
        self.workers: list[Any] = []
        self.caches: list[dict[str, torch.Tensor]] = []
        said: dict[tuple[int, int], Any] = {}
        for rank in range(tp * pp):
            layers = [f"{name}.{rank // tp}" for name in LAYERS]
            config = stubs.vllm_config(extra, layers, device="cpu", rank=rank, **sizes)
            config.model_config.use_mla = mla
            if rank == 0:
                self.scheduler = plugin.TracehaulConnector(config, role.SCHEDULER, blocks)
                self.scheduler.bind_kv_cache_manager(stubs.KVCacheManager())
            self.caches.append({name: torch.zeros(BLOCKS, 2, 4, 64, dtype=torch.bfloat16) for name in layers})
            self.workers.append(plugin.TracehaulConnector(config, role.WORKER, blocks))
            self.workers[-1].register_kv_caches(self.caches[-1])
            said[rank // tp, rank % tp] = self.workers[-1].get_handshake_metadata()
        self.scheduler.set_xfer_handshake_metadata_pp_aware(said)

    def compute(self, asked: Any, blocks: list[int], ranks: list[int] | None = None) -> None:
        """All of the prompt, by all ranks; only some of them live to save it."""
        assert self.matched(asked) == (0, False)
        self.scheduler.update_state_after_alloc(asked, SimpleNamespace(get_block_ids=lambda: (blocks,)), 0)
        for caches in self.caches:
            for cache in caches.values():
                cache[blocks] = torch.randn(cache[blocks].shape).to(cache.dtype)
        self.step(asked.request_id, blocks, 0, asked.num_tokens, ranks)

    def step(self, name: str, blocks: list[int], computed: int, tokens: int, ranks: list[int] | None = None) -> None:
        new = SimpleNamespace(req_id=name, num_computed_tokens=computed, block_ids=(blocks,))
        cached = SimpleNamespace(req_ids=[], resumed_req_ids=set(), num_computed_tokens=[], new_block_ids=[])
        output = SimpleNamespace(
            scheduled_new_reqs=[new], scheduled_cached_reqs=cached, num_scheduled_tokens={name: tokens}
        )
        meta = self.scheduler.build_connector_meta(output)
        for rank, worker in enumerate(self.workers):
            if ranks is None or rank in ranks:
                worker.handle_preemptions(meta)
                worker.bind_connector_metadata(meta)
                worker.start_load_kv(None)
                worker.wait_for_save()

    def matched(self, asked: Any) -> tuple[int, bool]:
        for _ in range(500):
            tokens, later = self.scheduler.get_num_new_matched_tokens(asked, 0)
            if tokens is not None:
                return tokens, later
            time.sleep(0.01)
        raise AssertionError("a request is parked")

    def found(self, asked: Any, tokens: int) -> bool:
        """Once so many tokens are there for a request like this; False: they never are."""
        for number in range(100):
            again = request(f"{asked.request_id}/{number}", asked.all_token_ids)
            if self.matched(again)[0] == tokens:
                return True
            time.sleep(0.02)
        return False

    def pull(self, asked: Any, blocks: list[int]) -> None:
        """What was found, into these blocks, by all ranks."""
        tokens, later = self.matched(asked)
        self.scheduler.update_state_after_alloc(asked, SimpleNamespace(get_block_ids=lambda: (blocks,)), tokens)
        self.step(asked.request_id, blocks, tokens, asked.num_tokens - tokens)
        for worker in self.workers:
            left = 500
            while later and left:
                _, received = worker.get_finished(set())
                later_now = not (received and asked.request_id in received)
                left = left - 1 if later_now else 0
                time.sleep(0.01 if later_now else 0.0)
            assert worker.get_block_ids_with_load_errors() == set()

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    stubs.install_vllm(monkeypatch)
    return importlib.import_module("engines.vllm.plugin")


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_each_rank_pulls_its_own_part(rig: Fleet, vllm: Any, tp: int, pp: int):
    pool, text = f"ranks-{tp}-{pp}", prompt(10 * tp + pp)
    first = Ranks(vllm, rig.extra(name=f"{pool}-a", pool=pool), tp, pp)
    second = Ranks(vllm, rig.extra(name=f"{pool}-b", pool=pool), tp, pp)
    try:
        asked = request("a", text)
        first.compute(asked, [1, 2, 3])
        assert second.found(asked, 8)
        second.pull(request("b", text), [7, 5, 9])
        for ours, theirs in zip(first.caches, second.caches, strict=True):
            for name in ours:
                assert torch.equal(ours[name][[1, 2]], theirs[name][[7, 5]])
        kept = [caches[name][7] for caches in second.caches for name in caches]
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(kept, 2)), "no two are alike"
    finally:
        first.close()
        second.close()


def test_what_one_rank_lacks_none_of_them_takes(rig: Fleet, vllm: Any):
    first, text = Ranks(vllm, rig.extra(name="part-a", pool="part"), 2), prompt(1)
    try:
        asked = request("a", text)
        first.compute(asked, [1, 2, 3], ranks=[0])
        for _ in range(500):
            if first.workers[0]._store.exists(first.scheduler._scheduling._chain(asked).keys[:2]) == 2:
                break
            time.sleep(0.01)
        else:
            raise AssertionError("the first rank saved nothing")
        assert first.matched(request("b", text)) == (0, False)
    finally:
        first.close()


def test_of_a_latent_that_all_ranks_have_one_writes(rig: Fleet, vllm: Any):
    first = Ranks(vllm, rig.extra(name="mla-a", pool="mla"), 2, mla=True)
    second, text = Ranks(vllm, rig.extra(name="mla-b", pool="mla"), 1, mla=True), prompt(2)
    try:
        asked = request("a", text)
        first.compute(asked, [1, 2, 3])
        assert second.found(asked, 8), "how many ranks there are does not matter"
        assert first.workers[1]._store.stats.put == 0
        second.pull(request("b", text), [4, 5, 6])
        assert all(torch.equal(first.caches[0][name][1], second.caches[0][name][4]) for name in first.caches[0])
    finally:
        first.close()
        second.close()


def test_sglang_a_rank_finds_no_part_of_another(rig: Fleet, monkeypatch: pytest.MonkeyPatch):
    stubs.install_sglang(monkeypatch)
    plugin = importlib.import_module("engines.sglang.plugin")
    storages: list[Any] = []
    try:
        for rank in range(2):
            extra = rig.extra(name="sgl", pool="sgl-ranks")
            storages.append(plugin.TracehaulStorage(stubs.storage_config(extra, tp_rank=rank, tp_size=2), {}))
            storages[-1].register_mem_pool_host(stubs.MHATokenToKVPoolHost())
        first, second = storages
        keys, pages = [f"{number:064x}" for number in range(1, 3)], torch.arange(8)
        nothing = SimpleNamespace(prefix_keys=None)
        assert first.batch_set_v1(keys, pages, nothing) == [True, True]
        assert (first.batch_exists(keys), second.batch_exists(keys)) == (2, 0)
        assert second.batch_get_v1(keys, pages) == [False, False]
        second.mem_pool_host.kv_buffer[:] = 3
        assert second.batch_set_v1(keys, pages, nothing) == [True, True]
        first.mem_pool_host.kv_buffer[:] = 5
        assert first.batch_get_v1(keys, pages) == [True, True]
        assert not first.mem_pool_host.kv_buffer[:, :2].any(), "its own part, as it was"
    finally:
        for storage in storages:
            storage.close()


def test_no_two_parts_of_any_cut_have_one_root():
    layout = KVLayout("m@r", "bfloat16", 4, 2, 16, 2, 4)
    roots: dict[bytes, str] = {}
    for tp, pp in itertools.product((1, 2, 4), (1, 2)):
        for rank, stage in itertools.product(range(tp), range(pp)):
            said = shard(rank, tp, stage, pp, replicated=False)
            root = KVLayout(
                **{name: getattr(layout, name) for name in layout.__struct_fields__} | {"shard": said}
            ).root()
            assert roots.setdefault(root, said) == said
    assert len(roots) == sum(tp * pp for tp, pp in itertools.product((1, 2, 4), (1, 2)))
