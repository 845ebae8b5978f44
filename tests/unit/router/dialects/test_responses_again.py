"""Responses in the background that are asked for again, and that a router which starts goes on with."""

import asyncio
from typing import Any

import httpx

from records.fakes import MemoryDocuments
from router.calls.fakes import FakeDispatcher, say
from router.dispatch.steps import Output
from router.http.outliving import Outliving
from tests.unit.router.dialects.asking import served
from tests.unit.router.dialects.test_responses_kept import ASK, PATH, until


def test_what_runs_in_the_background_is_not_run_beside_itself_when_it_is_asked_for_again() -> None:
    documents, key = MemoryDocuments(), {"Idempotency-Key": "k"}
    ask: dict[str, Any] = ASK | {"background": True}
    names: dict[str, str] = {}

    async def before(client: httpx.AsyncClient) -> None:
        names["slow"] = (await client.post(PATH, json=ask, headers=key)).json()["id"]
        await until(client, names["slow"], "in_progress")

    async def after(client: httpx.AsyncClient) -> None:
        again = await client.post(PATH, json=ask, headers=key)
        assert (again.status_code, again.json()["id"]) == (200, names["slow"])
        await until(client, names["slow"], "completed")

    async def at_last(client: httpx.AsyncClient) -> None:
        again = await client.post(PATH, json=ask, headers=key)
        assert (again.json()["id"], again.json()["status"]) == (names["slow"], "completed")

    lives = [FakeDispatcher(lambda _: [Output([97]), 60.0]), FakeDispatcher(say("yes")), FakeDispatcher(say("no"))]
    for dispatcher, use in zip(lives, (before, after, at_last), strict=True):
        served(dispatcher, use, outliving=Outliving(documents, "router-0", 3600.0))
    assert [len(dispatcher.requests) for dispatcher in lives] == [1, 1, 0]


def test_a_response_in_the_background_waits_for_its_models_workers() -> None:
    dispatcher = FakeDispatcher(say("yes"))
    dispatcher.card, card = None, dispatcher.card

    async def use(client: httpx.AsyncClient) -> None:
        made = (await client.post(PATH, json=ASK | {"background": True})).json()
        await asyncio.sleep(0.01)
        assert (await client.get(f"{PATH}/{made['id']}")).json()["status"] == "queued"
        dispatcher.card = card
        await until(client, made["id"], "completed")

    served(dispatcher, use)
