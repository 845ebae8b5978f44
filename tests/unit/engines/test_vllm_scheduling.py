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


def picture(name: str, offset: int, length: int = 2) -> SimpleNamespace:
    return SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=offset, length=length))


def test_blocks_that_show_other_pictures_have_other_names() -> None:
    """Tokens of pictures are all the same, so nothing else tells them."""
    shown = [
        [],
        [picture("a", 1)],
        [picture("b", 1)],
        [picture("a", 2)],
        [picture("a", 1), picture("b", 3)],
        [picture('a",1],["b', 3)],
    ]
    named = [keys(mm_features=features) for features in shown]
    assert len({first for first, _ in named}) == len(named)
    assert len({second for _, second in named}) == len(named), "what comes after them is after them"
    late = keys(mm_features=[picture("a", 5)])
    assert late[0] == keys()[0], "what comes before a picture is everybody's"
    assert late[1] != keys()[1]
    across = keys(mm_features=[picture("a", 3)])
    assert len({across, late, keys()}) == 3
    assert across[0] != keys()[0]
    lora = SimpleNamespace(lora_name="l", lora_path="/l")
    assert keys(mm_features=shown[1], lora_request=lora)[0] not in {first for first, _ in named}


def test_no_two_adapters_have_one_name() -> None:
    one, other = SimpleNamespace(lora_name="a:b", lora_path="c"), SimpleNamespace(lora_name="a", lora_path="b:c")
    assert keys(lora_request=one) != keys(lora_request=other)


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


class Full:
    """A store that has everything."""

    ready = True

    def now_s(self) -> float:
        return 0.0

    def looking(self, hashes: list[BlockHash]) -> "concurrent.futures.Future[int]":
        found: concurrent.futures.Future[int] = concurrent.futures.Future()
        found.set_result(len(hashes))
        return found


NOTHING = SimpleNamespace(
    scheduled_cached_reqs=SimpleNamespace(
        req_ids=[], num_computed_tokens=[], new_block_ids=[], resumed_req_ids=set[str]()
    ),
    scheduled_new_reqs=[],
    num_scheduled_tokens={},
)


@pytest.mark.parametrize("later", [False, True])
def test_nobody_shares_what_a_step_has_yet_to_load(later: bool) -> None:
    scheduled = Scheduling(4, 5.0, reads=True, later=later)
    scheduled.joined(Full(), [ROOT])  # type: ignore[arg-type]
    one = request("a")
    assert scheduled.matched(one, 0) == (8, later)
    scheduled.allocated(one, [1, 2, 3], 8)
    if not later:
        assert scheduled.matched(request("b"), 8) == (None, False), "vLLM has them in its index already"
        assert scheduled.matched(request("c", cache_salt="t"), 8) == (0, False)
    loads, _ = scheduled.step(NOTHING, saving=True)
    assert [move.block_ids for move in loads] == [[1, 2]]
    assert scheduled.matched(request("b"), 8) == (0, False), "they have come"


def test_what_follows_a_lost_block_is_wrong_also_of_a_request_that_has_left() -> None:
    scheduled = Scheduling(4, 5.0, reads=True, later=False)
    scheduled.joined(Full(), [ROOT])  # type: ignore[arg-type]
    one = request("a")
    scheduled.matched(one, 0)
    scheduled.allocated(one, [1, 2, 3], 8)
    scheduled.step(NOTHING, saving=True)
    scheduled.finished("a")
    assert scheduled.failed({2}) == {2, 3}
    scheduled.step(NOTHING, saving=True)
    assert scheduled.failed({2}) == set(), "by now they may be another's"
