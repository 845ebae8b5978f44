"""What vLLM's scheduler waits for, and how blocks of adapters are called, without vLLM and without a store."""

import concurrent.futures
from types import SimpleNamespace
from typing import Any

import pytest

from engines.vllm import scheduling
from engines.vllm.chains import Chain
from engines.vllm.scheduling import GLANCE_S, Scheduling
from tracehaul.wire.ids import BlockHash

ROOT = BlockHash(b"r" * 16)


def request(name: str, **more: Any) -> SimpleNamespace:
    tokens = list(range(9))
    said = {"cache_salt": None, "lora_request": None, "mm_features": [], "prompt_embeds": None}
    return SimpleNamespace(request_id=name, all_token_ids=tokens, num_tokens=len(tokens), **{**said, **more})


def keys(**more: Any) -> tuple[BlockHash, ...]:
    chain = Chain(request("a", **more), 4, ROOT)
    chain.upto(2)
    return tuple(chain.keys)


def test_no_salt_of_a_client_is_an_adapter() -> None:
    lora = SimpleNamespace(lora_name="l", lora_path="/l")
    other = SimpleNamespace(lora_name="l", lora_path="/m")
    named = [keys(), keys(lora_request=lora), keys(lora_request=other), keys(cache_salt="lora:l:/l")]
    named += [keys(cache_salt="t"), keys(cache_salt="t", lora_request=lora)]
    assert len(set(named)) == len(named)


class Silent:
    """A store whose looks do not end."""

    ready = True

    def __init__(self) -> None:
        self.at_s = 0.0

    def now_s(self) -> float:
        return self.at_s

    def looking(self, hashes: list[BlockHash]) -> "concurrent.futures.Future[int]":
        return concurrent.futures.Future()


def test_a_step_waits_for_all_looks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    store, scheduled = Silent(), Scheduling(4, 5.0, reads=True)
    scheduled.joined(store, [ROOT])  # type: ignore[arg-type]

    def wait(asked: list[Any], timeout: float) -> tuple[set[Any], set[Any]]:
        store.at_s += timeout
        return set(), set(asked)

    monkeypatch.setattr(scheduling.concurrent.futures, "wait", wait)
    cached = SimpleNamespace(req_ids=[], num_computed_tokens=[], new_block_ids=[], resumed_req_ids=set())
    output = SimpleNamespace(scheduled_cached_reqs=cached, scheduled_new_reqs=[], num_scheduled_tokens={})
    for step in (1, 2):
        for number in range(64):
            assert scheduled.matched(request(f"{number}"), 0) == (None, False)
        assert store.at_s == pytest.approx(step * GLANCE_S)
        scheduled.step(output, saving=True)
