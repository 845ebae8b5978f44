"""Calls of the background."""

import asyncio
from typing import Any

import msgspec
import pytest
from starlette.types import ASGIApp

from router.calls.fakes import FakeDispatcher, FakeText, say
from router.http.app import create_app
from router.http.config import ApiConfig
from sim import loop as virtual
from sim.lifespan import living
from tests.unit.router.http.test_calls import CHAT, CHAT_PATH, post
from tracehaul.runtime.offload import InlineOffload


@pytest.mark.parametrize("how", ["field", "header"])
def test_background_work_is_refused_where_the_fleet_has_no_room(how: str) -> None:
    dispatcher = FakeDispatcher(say("x"))
    body = CHAT | ({"service_tier": "flex"} if how == "field" else {})
    headers = {} if how == "field" else {"X-Step-Class": "background"}
    assert post(dispatcher, CHAT_PATH, body, headers=headers).status_code == 200
    assert dispatcher.requests[-1].step_class == "background"
    dispatcher.room = 0
    answer = post(dispatcher, CHAT_PATH, body, headers=headers | {"X-Deadline-S": "0.3"})
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "resource_unavailable"
    assert "idle capacity" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) > 0
    assert post(dispatcher, CHAT_PATH, CHAT | {"service_tier": "auto"}).status_code == 200
    assert len(dispatcher.requests) == 2


class Client:
    """One call by the ASGI interface itself, which wakes nobody up."""

    def __init__(self, app: ASGIApp, at: int) -> None:
        asked = [{"role": "user", "content": f"{at}"}]
        self._body = [msgspec.json.encode(CHAT | {"messages": asked, "service_tier": "flex", "stream": at % 2 == 0})]
        self.messages: list[Any] = []
        self.task = asyncio.create_task(self._call(app))

    async def _call(self, app: ASGIApp) -> None:
        await app({"type": "http", "method": "POST", "path": CHAT_PATH, "headers": []}, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def _send(self, message: Any) -> None:
        self.messages.append(message)


def woken(calls: int) -> int:
    """How often anything runs in 100 seconds in which so many wait, which all have their turn then."""
    counts: list[int] = []

    async def main() -> None:
        loop, dispatcher = asyncio.get_running_loop(), FakeDispatcher(say("x"))
        dispatcher.room = 0
        app = create_app(dispatcher, {"org/fake": FakeText()}, lambda: b"", ApiConfig(), InlineOffload())
        async with living(app):
            clients = [Client(app, at) for at in range(calls)]
            await asyncio.sleep(30.0)
            plain, count = loop.call_soon, 0

            def call_soon(*args: Any, **more: Any) -> asyncio.Handle:
                nonlocal count
                count += 1
                return plain(*args, **more)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "call_soon", call_soon)
                await asyncio.sleep(100.0)
            assert not any(client.messages for client in clients)
            counts.append(count)
            dispatcher.room = 64
            await asyncio.gather(*(client.task for client in clients))
            assert {client.messages[0]["status"] for client in clients} == {200}

    virtual.run(main)
    return counts[0]


def test_calls_that_wait_wake_nobody_up() -> None:
    few = woken(4)
    assert few > 100, "somebody looks what there is room for"
    assert woken(400) == few
