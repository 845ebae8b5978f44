"""A call's urgency: how it is read, what it comes to in steps, and what a client is told at its deadline."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import msgspec
import pytest

from router.calls.errors import CallFailed
from router.calls.fakes import FakeDispatcher, FakeText, say
from router.calls.urgency import Urgency, urgency
from router.dispatch.config import DispatchConfig
from router.dispatch.dispatch import Dispatch
from router.http.app import create_app
from router.http.config import ApiConfig
from sim import loop as virtual
from tests.unit.router.http.test_calls import CHAT, CHAT_PATH, TEXT, TEXT_PATH, post
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.base import Ok
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.errors import Unavailable
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import BlockHash, Generation, NodeId
from tracehaul.wire.steps import DecodeStep, StepUsage, Tokens

ROOT = BlockHash(b"r" * 16)


def test_headers_say_how_urgent_a_call_is() -> None:
    assert urgency({}, 100.0) == Urgency("standard", 0, None)
    told = {"x-step-class": "Background", "x-priority": "-7", "x-deadline-s": "2.5"}
    assert urgency(told, 100.0) == Urgency("background", -7, 102.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-step-class", "urgent"),
        ("x-step-class", ""),
        ("x-priority", "high"),
        ("x-priority", "1.5"),
        ("x-priority", "1000001"),
        ("x-priority", "9" * 5000),
        ("x-deadline-s", "0"),
        ("x-deadline-s", "-1"),
        ("x-deadline-s", "nan"),
        ("x-deadline-s", "inf"),
        ("x-deadline-s", "soon"),
    ],
)
def test_a_header_that_makes_no_sense_is_named(name: str, value: str) -> None:
    with pytest.raises(CallFailed) as caught:
        urgency({name: value}, 0.0)
    assert (caught.value.cause, caught.value.param) == ("invalid", name)
    answer = post(FakeDispatcher(say("x")), CHAT_PATH, CHAT, headers={name: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_every_step_of_a_call_carries_it() -> None:
    dispatcher = FakeDispatcher(say("x"))
    headers = {"X-Step-Class": "interactive", "X-Priority": "3", "X-Deadline-S": "900"}
    post(dispatcher, TEXT_PATH, TEXT | {"n": 2, "prompt": ["a", "b"], "cache_salt": "acme"}, headers=headers)
    assert len(dispatcher.requests) == 4
    for request in dispatcher.requests:
        assert (request.tenant, request.salt) == ("acme", "acme")
        assert (request.step_class, request.priority) == ("interactive", 3)
        assert request.deadline_s is not None
    assert len({request.deadline_s for request in dispatcher.requests}) == 1


class Frozen:
    """A decode worker that says so many tokens, and then nothing for ever."""

    def __init__(self, tokens: bytes) -> None:
        self.tokens = tokens
        self.asked: list[DecodeStep] = []
        self.left = 0

    async def call(self, request: Any, context: Any) -> Ok:
        return Ok()

    async def stream(self, request: Any, context: Any) -> AsyncGenerator[Tokens, None]:
        self.asked.append(request)
        try:
            for at, token in enumerate(self.tokens):
                yield Tokens(pack_tokens([token]), StepUsage() if at == 0 else None)
            await asyncio.sleep(1e6)
        finally:
            self.left += 1

    def disconnected(self, peer: str) -> None:
        pass


def call(worker: Frozen, body: Any, **config: Any) -> tuple[httpx.Response, float]:
    """The answer to a call with a deadline in two seconds, and when it came."""

    async def main() -> tuple[httpx.Response, float]:
        network = LocalNetwork()
        dispatch = Dispatch(Peers(network.at("router:1")), DispatchConfig(**config))
        await network.listen("router:1", dispatch.members)
        await network.listen("decode-0:1", worker)
        info = NodeInfo(NodeId("decode-0"), Generation(1), "decode", "decode-0:1", "org/fake", ROOT, 8, 1000)
        member = Membership(Peers(network.at("decode-0:1")), ["router:1"], info, NodeLoad, lambda members: None)
        joining = asyncio.create_task(member.run())
        await member.joined.wait()
        app = create_app(dispatch, {"org/fake": FakeText()}, lambda: b"", ApiConfig(), InlineOffload())
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            began_s = clock.now_s()
            answer = await client.post(CHAT_PATH, json=body, headers={"X-Deadline-S": "2"}, timeout=None)
            took_s = clock.now_s() - began_s
        await asyncio.sleep(1)
        joining.cancel()
        await dispatch.close()
        return answer, took_s

    return virtual.run(main)


@pytest.mark.parametrize("said", [b"", b"ab"])
def test_a_whole_answer_is_a_504_at_the_deadline(said: bytes) -> None:
    worker = Frozen(said)
    answer, took_s = call(worker, CHAT)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.json()["error"]["type"] == "timeout"
    assert "retry-after" not in answer.headers
    assert took_s == pytest.approx(2.0, abs=0.01)
    (asked,) = worker.asked
    assert asked.deadline_in_s == pytest.approx(2.0, abs=0.01)
    assert worker.left == 1, "it is told to stop"


def test_a_stream_ends_with_an_error_after_what_was_said() -> None:
    answer, took_s = call(Frozen(b"ab"), CHAT | {"stream": True})
    assert answer.status_code == 200
    *events, last, done = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    assert done == "[DONE]"
    assert msgspec.json.decode(last)["error"]["code"] == "deadline_exceeded"
    deltas = [msgspec.json.decode(event)["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == "ab"
    assert took_s == pytest.approx(2.0, abs=0.01)


def test_a_stream_that_has_not_begun_is_a_504() -> None:
    answer, _ = call(Frozen(b""), CHAT | {"stream": True})
    assert answer.status_code == 504


def test_a_pause_between_attempts_ends_at_the_deadline() -> None:
    class Dying(Frozen):
        async def stream(self, request: Any, context: Any) -> AsyncGenerator[Tokens, None]:
            self.asked.append(request)
            raise Unavailable("not now")
            yield

    worker = Dying(b"")
    answer, took_s = call(worker, CHAT, retry_pause_s=100.0)
    assert answer.status_code == 504
    assert took_s == pytest.approx(2.0, abs=0.01)
    assert len(worker.asked) == 1
