"""Responses that run in the background, streamed: from the beginning, later, and from an event on."""

import asyncio
from typing import Any

import httpx
import msgspec
import pytest

from router.calls.fakes import FakeDispatcher, say
from router.http.config import ApiConfig
from tests.unit.router.dialects.asking import served

PATH = "/v1/responses"
ASK: dict[str, Any] = {"model": "org/fake", "input": "hi", "background": True}
SAID = "some words"


def told(text: str) -> list[dict[str, Any]]:
    assert not text or text.endswith("\n\n")
    events = [event for event in text.split("\n\n")[:-1] if not event.startswith(":")]
    return [msgspec.json.decode(event.partition("data: ")[2]) for event in events]


async def made(client: httpx.AsyncClient) -> str:
    return (await client.post(PATH, json=ASK)).json()["id"]


async def stream(client: httpx.AsyncClient, name: str, after: int | None = None) -> list[dict[str, Any]]:
    query = {"stream": "true"} | ({} if after is None else {"starting_after": str(after)})
    answer = await client.get(f"{PATH}/{name}", params=query)
    assert answer.headers["content-type"].startswith("text/event-stream")
    return told(answer.text)


async def whole(client: httpx.AsyncClient, name: str) -> dict[str, Any]:
    while (body := (await client.get(f"{PATH}/{name}")).json())["status"] in ("queued", "in_progress"):  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    return body


@pytest.mark.parametrize("running", [True, False], ids=["running", "ended"])
def test_a_response_is_streamed_later_from_any_of_its_events(running: bool) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        name = await made(client)
        if not running:
            await whole(client, name)
        events = await stream(client, name)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert (events[0]["type"], events[-1]["type"]) == ("response.created", "response.completed")
        assert events[-1]["response"] == await whole(client, name)
        for after in range(len(events)):
            assert await stream(client, name, after) == events[after + 1 :]
        beyond = await client.get(f"{PATH}/{name}", params={"stream": "true", "starting_after": "999"})
        assert (beyond.status_code, beyond.json()["error"]["param"]) == (400, "starting_after")

    served(FakeDispatcher(say(SAID, delay_s=0.002)), use)


def test_it_is_streamed_at_once_where_that_is_asked_and_several_may_listen() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        answer = await client.post(PATH, json=ASK | {"stream": True})
        events = told(answer.text)
        name = events[0]["response"]["id"]
        assert events[-1]["response"]["status"] == "completed"
        assert await asyncio.gather(*(stream(client, name) for _ in range(3))) == [events] * 3

    served(FakeDispatcher(say(SAID, delay_s=0.001)), use)


def test_one_that_is_cancelled_or_fails_says_so_in_its_stream() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        name = await made(client)
        listening = asyncio.ensure_future(stream(client, name))
        await asyncio.sleep(0.02)
        await client.post(f"{PATH}/{name}/cancel")
        events = await listening
        assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.failed", "cancelled")
        assert await stream(client, name) == events
        long = (await client.post(PATH, json=ASK | {"input": "x" * 5000})).json()["id"]
        (failed,) = await stream(client, long)
        assert failed["response"]["error"]["code"] == "context_length_exceeded"

    served(FakeDispatcher(lambda _: [60.0]), use)


def test_what_cannot_be_streamed_says_why() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        name = (await client.post(PATH, json={"model": "org/fake", "input": "hi"})).json()["id"]
        plain = await client.get(f"{PATH}/{name}", params={"stream": "true"})
        assert plain.status_code == 400
        assert "background" in plain.json()["error"]["message"]
        other = await made(client)
        for bad in ("-1", "x", ""):
            answer = await client.get(f"{PATH}/{other}", params={"stream": "true", "starting_after": bad})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "starting_after")
        unknown = await client.get(f"{PATH}/resp_none", params={"stream": "true"})
        assert unknown.status_code == 404

    served(FakeDispatcher(say("x")), use)


def test_streams_that_are_kept_count_as_memory() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        names = [await made(client) for _ in range(8)]
        for name in names:
            await asyncio.sleep(0.01)
            answer = await client.get(f"{PATH}/{name}")
            assert answer.status_code in (200, 404)
        left = [name for name in names if (await client.get(f"{PATH}/{name}")).status_code == 200]
        assert 0 < len(left) < len(names)

    served(FakeDispatcher(say("x" * 200)), use, config=ApiConfig(responses_bytes_max=20_000))


def test_a_background_call_under_a_key_is_one() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        headers = {"Idempotency-Key": "k"}
        first, again = [(await client.post(PATH, json=ASK, headers=headers)).json() for _ in range(2)]
        assert first == again
        assert len(await stream(client, first["id"])) > 3
        assert len(dispatcher.requests) == 1

    dispatcher = FakeDispatcher(say(SAID))
    served(dispatcher, use)
