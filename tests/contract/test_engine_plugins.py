"""Both plugins against a real store: as SGLang's threads and vLLM's scheduler and workers call them."""

import importlib
import time  # noqa: TID251 - threads wait here, and no loop
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from engines.blocks import EngineRefused
from tests import engine_stubs as stubs
from tests.engine_rig import Fleet, fleet
from tests.engine_vllm import BLOCKS, LAYERS, Engine, request
from tracehaul.wire.hashing import KVLayout, named, pack_tokens
from tracehaul.wire.naming import Naming


@pytest.fixture(scope="module")
def rig() -> Iterator[Fleet]:
    with fleet() as made:
        yield made


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Any:
    stubs.install_sglang(monkeypatch)
    return importlib.import_module("engines.sglang.plugin")


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    stubs.install_vllm(monkeypatch)
    return importlib.import_module("engines.vllm.plugin")


# --- SGLang -------------------------------------------------------------------------------------------------


class Server:
    """A server of SGLang, as far as its host pool goes."""

    def __init__(self, plugin: Any, extra: dict[str, Any], **changes: Any) -> None:
        self.pool = stubs.MHATokenToKVPoolHost()
        self.storage = plugin.TracehaulStorage(stubs.storage_config(extra, **changes), {})
        self.storage.register_mem_pool_host(self.pool)

    def fill(self, pages: int) -> None:
        shape = self.pool.kv_buffer[:, :pages].shape
        self.pool.kv_buffer[:, :pages] = torch.randn(shape).to(self.pool.dtype)

    def indices(self, *pages: int) -> torch.Tensor:
        size = self.pool.page_size
        return torch.cat([torch.arange(page * size, (page + 1) * size) for page in pages])


KEYS = [f"{number:064x}" for number in range(1, 9)]


def test_sglang_pages_go_from_one_server_to_another(rig: Fleet, sglang: Any, tmp_path: Path):
    file = tmp_path / "layout.json"
    first = Server(sglang, rig.extra(name="sgl-0", pool="sgl", layout_file=str(file)))
    second = Server(sglang, rig.extra(name="sgl-1", pool="sgl"))
    assert not first.pool.kv_buffer.any(), "the page that was looked at is as it was"
    first.fill(3)
    before = SimpleNamespace(prefix_keys=None)
    assert first.storage.batch_set_v1(KEYS[:2], first.indices(0, 1), before) == [True, True]
    assert first.storage.batch_set_v1(KEYS[2:3], first.indices(2), SimpleNamespace(prefix_keys=KEYS[:2])) == [True]
    assert second.storage.batch_exists(KEYS[:5]) == 3
    assert second.storage.exists(KEYS[0])
    assert second.storage.batch_get_v1(KEYS[:4], second.indices(7, 2, 5, 9)) == [True, True, True, False]
    ours, theirs = first.pool.kv_buffer, second.pool.kv_buffer
    assert [torch.equal(ours[:, a], theirs[:, b]) for a, b in ((0, 7), (1, 2), (2, 5))] == [True] * 3
    assert not theirs[:, 9].any()
    layout = msgspec.json.decode(file.read_bytes(), type=KVLayout)
    assert layout.hashing == "sglang/sha256"
    assert first.storage._block(KEYS[0]) == named(layout.root(), bytes.fromhex(KEYS[0])), "what others can compute"
    second.storage.close()
    assert second.storage.batch_get_v1(KEYS[:1], second.indices(0)) == [False]
    first.storage.close()


def test_sglang_a_dead_store_is_a_miss(rig: Fleet, sglang: Any):
    server = Server(sglang, rig.extra(name="sgl-dead", pool="sgl"))
    server.fill(2)
    server.storage.batch_set_v1(KEYS[5:7], server.indices(0, 1))
    rig.kill()
    try:
        assert server.storage.batch_get_v1(KEYS[5:7], server.indices(3, 4)) == [False, False]
        assert server.storage.batch_set_v1(KEYS[7:], server.indices(0)) == [False]
        assert server.storage.batch_exists(KEYS) == 0
    finally:
        server.storage.close()
        rig.start_store()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tp_size": 2}, "shard '1' and not '2'"),
        ({"model_name": "n"}, "model 'm@r1' and not 'n@r1'"),
        ({"attn_cp_size": 2}, "attn_cp_size"),
        ({"should_split_heads": True}, "tp_lcm_size"),
    ],
)
def test_sglang_refuses_what_does_not_fit(rig: Fleet, sglang: Any, changes: dict[str, Any], told: str):
    first = Server(sglang, rig.extra(name="sgl-a", pool="fit"))
    try:
        with pytest.raises(EngineRefused, match=told):
            Server(sglang, rig.extra(name="sgl-b", pool="fit"), **changes)
    finally:
        first.storage.close()


def test_sglang_refuses_pools_that_it_does_not_know(rig: Fleet, sglang: Any, monkeypatch: pytest.MonkeyPatch):
    storage = sglang.TracehaulStorage(stubs.storage_config(rig.extra()), {})
    with pytest.raises(EngineRefused, match="hybrid"):
        storage.register_mem_host_pool_v2(None, "mamba")
    storage.register_mem_host_pool_v2(None, "kv")

    class Unknown(stubs.MHATokenToKVPoolHost):
        pass

    with pytest.raises(EngineRefused, match="Unknown was not verified"):
        storage.register_mem_pool_host(Unknown())
    monkeypatch.setattr(stubs.MHATokenToKVPoolHost, "layout", "layer_first")
    with pytest.raises(EngineRefused, match="page_first_direct"):
        storage.register_mem_pool_host(stubs.MHATokenToKVPoolHost())


def test_sglang_refuses_pages_that_are_elsewhere(rig: Fleet, sglang: Any, monkeypatch: pytest.MonkeyPatch):
    right = stubs.MHATokenToKVPoolHost.get_page_buffer_meta

    def swapped(self: Any, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        pointers, sizes = right(self, indices)
        return pointers[::-1], sizes

    monkeypatch.setattr(stubs.MHATokenToKVPoolHost, "get_page_buffer_meta", swapped)
    with pytest.raises(EngineRefused, match="not where they were expected"):
        Server(sglang, rig.extra())


def test_sglang_of_another_interface_is_refused_by_name(rig: Fleet, sglang: Any, monkeypatch: pytest.MonkeyPatch):
    def older(self: Any, keys: Any) -> int:
        return 0

    monkeypatch.setattr(stubs.HiCacheStorage, "batch_exists", older)
    with pytest.raises(EngineRefused, match=r"batch_exists takes \(keys\), not \(keys, extra_info\)"):
        sglang.TracehaulStorage(stubs.storage_config(rig.extra()), {})


# --- vLLM ---------------------------------------------------------------------------------------------------


def saved(engine: Engine, asked: Any, blocks: int) -> None:
    """The request's first so many blocks can be got."""
    tokens = 0
    for _ in range(500):
        tokens, _ = engine.matched(asked)
        if tokens == blocks * 4:
            return
        time.sleep(0.01)
    raise AssertionError(f"{tokens} tokens are there")


def held(engine: Engine, name: str) -> list[int]:
    """Which of the request's blocks the store has, once nothing is on its way there."""
    store = engine.worker._store
    for _ in range(500):
        if store.puts_free == len(store._joined.puts):
            break
        time.sleep(0.01)
    return [engine.scheduler._store.exists([key]) for key in engine.scheduler._scheduling._chains[name].keys]


def test_vllm_blocks_go_from_one_server_to_another(rig: Fleet, vllm: Any):
    first = Engine(vllm, rig.extra(name="vl-0", pool="vl"))
    second = Engine(vllm, rig.extra(name="vl-1", pool="vl"))
    assert not any(cache.any() for cache in first.caches.values()), "what was looked at is as it was"
    prompt = list(range(100, 114))
    asked = request("a", prompt)
    assert first.matched(asked) == (0, False)
    first.allocate(asked, [3, 1, 7, 9], 0)
    first.fill(3, 1, 7, 9)
    meta = first.step({"a": (0, 14)}, {})
    assert [move.block_ids for move in meta.saves] == [[3, 1, 7]], "the last one is not full"
    kept = {name: cache.clone() for name, cache in first.caches.items()}
    first.fill(3, 1, 7)  # used for something else at once
    prompt += [5, 6]
    first.allocate(asked, [3, 1, 7, 9], 0)
    assert [move.block_ids for move in first.step({}, {"a": (14, 2, None)}).saves] == [[9]], "decoded blocks go too"
    again = request("b", prompt)
    saved(second, again, 3)  # one token at least is computed
    longer = request("c", [*prompt, 1])
    saved(second, longer, 4)
    layout = second.worker.get_handshake_metadata().layout
    assert second.scheduler._store.exists(Naming.of(layout).names(pack_tokens(prompt))) == 4, "what others can compute"
    second.allocate(longer, [2, 4, 6, 8, 10], 16)
    assert second.step({}, {}).loads[0].block_ids == [2, 4, 6, 8]
    assert second.loaded("c") == set()
    for name in LAYERS:
        pairs = ((3, 2), (1, 4), (7, 6))
        assert all(torch.equal(kept[name][a], second.caches[name][b]) for a, b in pairs)
    assert second.step({"c": (16, 1)}, {}).saves == [], "what came from the store is not sent back"
    # Another tenant, adapter or picture is another prompt.
    lora = SimpleNamespace(lora_name="l", lora_path="/l")
    picture = SimpleNamespace(identifier="p", mm_position=SimpleNamespace(offset=5, length=2))
    others = ({"cache_salt": "t"}, {"lora_request": lora}, {"prompt_embeds": torch.zeros(1)})
    for number, other in enumerate(others):
        assert second.matched(request(f"o{number}", longer.all_token_ids, **other)) == (0, False)
    assert second.matched(request("p", longer.all_token_ids, mm_features=[picture])) == (4, True)
    first.close()
    second.close()


def test_vllm_what_is_lost_between_look_and_load_is_computed(rig: Fleet, vllm: Any):
    engine = Engine(vllm, rig.extra(name="vl-lost", pool="vl", timeout_s=1.0))
    asked = request("a", list(range(300, 309)))
    engine.matched(asked)
    engine.allocate(asked, [1, 2, 3], 0)
    engine.fill(1, 2)
    engine.step({"a": (0, 9)}, {})
    engine.scheduler.request_finished(asked, [1, 2, 3])
    other = request("b", list(range(300, 309)))
    saved(engine, other, 2)
    engine.allocate(other, [4, 5, 6], 8)
    rig.kill()
    try:
        engine.step({}, {})
        assert engine.loaded("b") == {4, 5}
        assert engine.matched(request("c", list(range(300, 309)))) == (0, False)
        began = time.monotonic()
        engine.step({"b": (0, 9)}, {})
        assert time.monotonic() - began < 0.3, "no step waits for a put"
    finally:
        engine.close()
        rig.start_store()


def test_vllm_on_a_cpu_the_step_that_needs_blocks_loads_them(rig: Fleet, vllm: Any):
    engine = Engine(vllm, rig.extra(name="vl-cpu", pool="vl", timeout_s=1.0), device="cpu")
    prompt = list(range(500, 509))
    asked = request("a", prompt)
    engine.matched(asked)
    engine.allocate(asked, [1, 2, 3], 0)
    engine.fill(1, 2)
    engine.step({"a": (0, 9)}, {})
    engine.scheduler.request_finished(asked, [1, 2, 3])
    kept = {name: cache.clone() for name, cache in engine.caches.items()}
    other = request("b", prompt)
    saved(engine, other, 2)
    assert engine.matched(other) == (8, False), "it is not to wait"
    engine.allocate(other, [4, 5, 6], 8)
    meta = engine.step({"b": (8, 1)}, {})
    assert [move.block_ids for move in meta.loads] == [[4, 5]]
    assert meta.saves == []
    for name, cache in engine.caches.items():
        assert torch.equal(cache[4], kept[name][1])
        assert torch.equal(cache[5], kept[name][2])
    assert engine.worker.get_finished(set()) == (None, None), "no request waited"
    assert engine.worker.get_block_ids_with_load_errors() == set()
    lost = request("c", prompt)
    assert engine.matched(lost) == (8, False)
    engine.allocate(lost, [7, 8, 9], 8)
    rig.kill()
    try:
        began = time.monotonic()
        engine.step({"c": (8, 1)}, {})
        assert time.monotonic() - began < 1.7, "a lost store holds a step no longer than was said"
        assert engine.worker.get_block_ids_with_load_errors() == {7, 8}
    finally:
        engine.close()
        rig.start_store()


def test_vllm_what_a_step_computes_on_blocks_that_did_not_come_is_not_shared(
    rig: Fleet, vllm: Any, monkeypatch: pytest.MonkeyPatch
):
    first, engine = Engine(vllm, rig.extra(name="vl-there", pool="vl")), None
    try:
        text = list(range(700, 717))
        first.matched(request("a", text[:9]))
        first.allocate(request("a", text[:9]), [1, 2, 3], 0)
        first.fill(1, 2)
        first.step({"a": (0, 9)}, {})
        engine = Engine(vllm, rig.extra(name="vl-spoilt", pool="vl"), device="cpu")
        asked = request("b", text)
        saved(engine, asked, 2)
        engine.allocate(asked, [4, 5, 6, 7, 8], 8)
        got = engine.worker._store.get
        monkeypatch.setattr(engine.worker._store, "get", lambda keys, pages, timeout_s: [True, False])
        beside = request("c", list(range(800, 805)))
        engine.matched(beside)
        engine.allocate(beside, [9, 10], 0)
        engine.fill(9)
        meta = engine.step({"b": (8, 4), "c": (0, 5)}, {})
        assert (len(meta.loads), [move.block_ids for move in meta.saves]) == (1, [[6], [9]])
        assert engine.failed() == {5}
        assert engine.index.evicted == {5, 6, 7, 8}, "nobody finds what was computed on nothing"
        assert held(engine, "c") == [1], "a request beside it has nothing to do with that"
        assert held(engine, "b") == [1, 1, 0, 0], "what was computed on nothing is nowhere"
        engine.fill(5, 6, 7)
        meta = engine.step({}, {"b": (4, 12, None)})
        assert [move.block_ids for move in meta.saves] == [[5, 6, 7]], "what was computed instead is shared"
        assert held(engine, "b") == [1, 1, 1, 1]
        kept = {name: cache.clone() for name, cache in engine.caches.items()}
        monkeypatch.setattr(engine.worker._store, "get", got)
        again = request("d", text)
        saved(engine, again, 4)
        engine.allocate(again, [1, 2, 11, 12, 13], 16)
        engine.step({"d": (16, 1)}, {})
        assert engine.failed() == set()
        assert all(torch.equal(kept[name][a], engine.caches[name][b]) for name in LAYERS for a, b in ((6, 11), (7, 12)))
    finally:
        first.close()
        if engine is not None:
            engine.close()


def test_vllm_what_is_computed_instead_of_a_late_load_is_saved(rig: Fleet, vllm: Any, monkeypatch: pytest.MonkeyPatch):
    engine = Engine(vllm, rig.extra(name="vl-instead", pool="vl"))
    asked = request("b", list(range(900, 909)))
    assert engine.matched(asked) == (0, False)
    engine.allocate(asked, [1, 2, 3], 0)
    engine.step({"b": (0, 9)}, {})
    saved(engine, request("c", asked.all_token_ids), 2)
    other = request("d", asked.all_token_ids)
    assert engine.matched(other) == (8, True)
    engine.allocate(other, [4, 5, 6], 8)
    monkeypatch.setattr(engine.worker._store, "get", lambda keys, pages, timeout_s: [True, False])
    engine.step({}, {})
    failed = engine.loaded("d")
    assert failed == {5}
    engine.scheduler.update_connector_output(SimpleNamespace(invalid_block_ids=failed))
    engine.allocate(other, [4, 5, 6], 0)
    assert [move.block_ids for move in engine.step({"d": (4, 5)}, {}).saves] == [[5]]
    engine.close()


def test_vllm_of_several_ranks_waits_for_no_load_in_a_step(rig: Fleet, vllm: Any):
    config = stubs.vllm_config(rig.extra(), LAYERS, device="cpu", tensor_parallel_size=2)
    connector = vllm.TracehaulConnector(config, stubs.KVConnectorRole.SCHEDULER, stubs.cache_config(BLOCKS))
    assert connector._scheduling._later, "one rank may lack what the other computes on"


def test_vllm_what_the_store_lost_is_saved_again(rig: Fleet, vllm: Any):
    engine = Engine(vllm, rig.extra(name="vl-again", pool="vl"))
    asked = request("a", list(range(400, 409)))
    assert engine.matched(asked, 8) == (0, False), "both blocks are in the engine, and none in the store"
    engine.allocate(asked, [1, 2, 3], 0)
    engine.fill(1, 2)
    assert [move.block_ids for move in engine.step({"a": (8, 1)}, {}).saves] == [[1, 2]]
    saved(engine, request("b", list(range(400, 409))), 2)
    engine.close()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"tensor_parallel_size": 2}, "shard '1' and not '2'"),
        ({"backend": "FLASH_ATTN"}, "FLASH_ATTN was not verified"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size"),
    ],
)
def test_vllm_refuses_what_does_not_fit(rig: Fleet, vllm: Any, how: dict[str, Any], told: str):
    first = Engine(vllm, rig.extra(name="vl-a", pool="vfit"))
    try:
        with pytest.raises(EngineRefused, match=told):
            Engine(vllm, rig.extra(name="vl-b", pool="vfit"), **how)
        with pytest.raises(EngineRefused, match="'m@r1' and not 'm@r2'"):
            Engine(vllm, rig.extra(name="vl-c", pool="vfit", revision="r2"))
    finally:
        first.close()


def test_vllm_refuses_hybrids_and_a_policy_that_fails(rig: Fleet, vllm: Any):
    config = stubs.vllm_config(rig.extra(), LAYERS)
    hybrid = stubs.cache_config(BLOCKS, stubs.FullAttentionSpec(), stubs.MambaSpec())
    with pytest.raises(EngineRefused, match="hybrid models are not served: this one's KV caches are FullAttentionSpec"):
        vllm.TracehaulConnector(config, stubs.KVConnectorRole.WORKER, hybrid)
    config.kv_transfer_config.kv_load_failure_policy = "fail"
    with pytest.raises(EngineRefused, match="recompute"):
        vllm.TracehaulConnector(config, stubs.KVConnectorRole.WORKER, stubs.cache_config(BLOCKS))


def test_vllm_of_another_interface_is_refused_by_name(rig: Fleet, vllm: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(stubs.KVConnectorBase_V1, "get_finished")
    with pytest.raises(EngineRefused, match=r"vLLM 0\.32\.0 has no KVConnectorBase_V1\.get_finished"):
        Engine(vllm, rig.extra())
