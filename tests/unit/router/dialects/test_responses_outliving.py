"""Responses in the background that outlive their router, and those that another one left."""

import asyncio
import threading

import httpx
import pytest

from records.documents import Document, Shelf
from records.fakes import MemoryDocuments
from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dispatch.steps import Output, StepRequest
from router.http import outliving as rooms
from router.http.config import ApiConfig
from router.http.outliving import Outliving
from tests.unit.router.dialects.asking import served
from tests.unit.router.dialects.test_responses_kept import ASK, PATH, until
from tracehaul.wire.hashing import unpack_tokens


def test_what_runs_in_the_background_outlives_its_router() -> None:
    documents = MemoryDocuments()
    names: dict[str, str] = {}

    def outliving() -> Outliving:
        return Outliving(documents, "router-0", 3600.0)

    async def before(client: httpx.AsyncClient) -> None:
        first = (await client.post(PATH, json=ASK | {"background": True})).json()
        names["ended"] = (await until(client, first["id"], "completed"))["id"]
        asked = ASK | {"input": "slow", "background": True, "previous_response_id": first["id"]}
        names["running"] = (await client.post(PATH, json=asked)).json()["id"]
        names["cancelled"] = (await client.post(PATH, json=asked)).json()["id"]
        await client.post(f"{PATH}/{names['cancelled']}/cancel")
        names["deleted"] = (await client.post(PATH, json=asked)).json()["id"]
        await client.delete(f"{PATH}/{names['deleted']}")
        await until(client, names["running"], "in_progress")

    def script(request: StepRequest) -> Script:
        prompt = FakeText().stream().push(unpack_tokens(request.prompt))
        return [Output([97]), 60.0] if "slow" in prompt else say("yes")(request)

    served(FakeDispatcher(script), before, outliving=outliving())
    dispatcher = FakeDispatcher(say("again"))

    async def after(client: httpx.AsyncClient) -> None:
        assert (await client.get(f"{PATH}/{names['ended']}")).json()["output"][0]["content"][0]["text"] == "yes"
        assert (await client.get(f"{PATH}/{names['cancelled']}")).json()["status"] == "cancelled"
        assert (await client.get(f"{PATH}/{names['deleted']}")).status_code == 404
        done = await until(client, names["running"], "completed")
        assert done["output"][0]["content"][0]["text"] == "again"
        goes_on = ASK | {"previous_response_id": names["ended"]}
        assert (await client.post(PATH, json=goes_on)).status_code == 200

    served(dispatcher, after, outliving=outliving())
    prompt = FakeText().stream().push(unpack_tokens(dispatcher.requests[0].prompt))
    assert prompt.index("hi") < prompt.index("yes") < prompt.index("slow"), "with all that it goes on from"
    assert dispatcher.requests[0].step_class == "background"


class SlowDocuments(MemoryDocuments):
    """Takes its time to write, and writes what nobody waits for, too."""

    def __init__(self) -> None:
        super().__init__()
        self.writing = asyncio.Event()
        self.go = asyncio.Event()

    async def put(self, shelf: Shelf, document: Document) -> None:
        self.writing.set()
        await self.go.wait()
        await super().put(shelf, document)


def test_places_in_the_background_are_taken_before_they_are_written_down() -> None:
    documents = SlowDocuments()

    async def use(client: httpx.AsyncClient) -> None:
        asking = [asyncio.create_task(client.post(PATH, json=ASK | {"background": True})) for _ in range(5)]
        await documents.writing.wait()
        await asyncio.sleep(0.05)
        documents.go.set()
        assert sorted([(await answer).status_code for answer in asking]) == [200, 200, 503, 503, 503]

    dispatcher = FakeDispatcher(lambda _: [60.0])
    config = ApiConfig(background_max=2)
    served(dispatcher, use, config=config, outliving=Outliving(documents, "router-0", 3600.0))


def test_whose_client_leaves_before_it_is_written_down_is_not_run_by_the_next_router() -> None:
    documents = SlowDocuments()

    async def use(client: httpx.AsyncClient) -> None:
        asking = asyncio.create_task(client.post(PATH, json=ASK | {"background": True}))
        await documents.writing.wait()
        asking.cancel()  # so it is where the server ends, too
        assert (await asking).status_code == 503
        documents.go.set()

    dispatcher = FakeDispatcher(say("yes"))
    served(dispatcher, use, outliving=Outliving(documents, "router-0", 3600.0))
    assert not dispatcher.requests
    assert not any(documents.kept.values())


def test_what_a_router_leaves_that_is_gone_is_gone_on_with() -> None:
    documents = MemoryDocuments()
    names: dict[str, str] = {}

    def script(request: StepRequest) -> Script:
        prompt = FakeText().stream().push(unpack_tokens(request.prompt))
        return [Output([97]), 60.0] if "slow" in prompt else say("yes")(request)

    async def before(client: httpx.AsyncClient) -> None:
        first = (await client.post(PATH, json=ASK | {"background": True})).json()
        names["ended"] = (await until(client, first["id"], "completed"))["id"]
        names["running"] = (await client.post(PATH, json=ASK | {"input": "slow", "background": True})).json()["id"]

    async def after(client: httpx.AsyncClient) -> None:
        assert (await client.get(f"{PATH}/{names['ended']}")).status_code == 404, "it lives"
        documents.gone = {"router-0"}
        async with asyncio.timeout(10):
            for name, text in (("ended", "yes"), ("running", "again")):
                while (await client.get(f"{PATH}/{names[name]}")).status_code == 404:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                done = await until(client, names[name], "completed")
                assert done["output"][0]["content"][0]["text"] == text

    served(FakeDispatcher(script), before, outliving=Outliving(documents, "router-0", 3600.0, shared=True))
    served(FakeDispatcher(say("again")), after, outliving=Outliving(documents, "router-1", 3600.0, shared=True))


def test_who_stood_still_lets_go_of_what_another_router_runs_by_now(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ADOPT_S": 0.02, "STILL_S": 0.1, "CALM_S": 0.3}.items():
        monkeypatch.setattr(rooms, name, value)
    documents = MemoryDocuments()
    own, other = Shelf(rooms.KIND, "router-0"), Shelf(rooms.KIND, "router-1")

    def script(request: StepRequest) -> Script:
        return [Output([97]), 60.0]

    async def use(client: httpx.AsyncClient) -> None:
        taken, kept = [
            (await client.post(PATH, json=ASK | {"input": "slow", "background": True})).json()["id"] for _ in range(2)
        ]
        fresh = taken.removeprefix("resp_")
        documents.kept.setdefault(other, {})[fresh] = documents.kept[own].pop(fresh)
        threading.Event().wait(0.3)
        async with asyncio.timeout(10):
            while (await client.get(f"{PATH}/{taken}")).status_code != 404:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert (await client.get(f"{PATH}/{kept}")).json()["status"] == "in_progress"
        assert list(documents.kept[own]) == [kept.removeprefix("resp_")]

    served(FakeDispatcher(script), use, outliving=Outliving(documents, "router-0", 3600.0, shared=True))


def test_what_ends_where_another_router_has_it_by_now_is_told_by_that_one() -> None:
    documents = MemoryDocuments()
    own, other = Shelf(rooms.KIND, "router-0"), Shelf(rooms.KIND, "router-1")

    async def use(client: httpx.AsyncClient) -> None:
        name = (await client.post(PATH, json=ASK | {"input": "slow", "background": True})).json()["id"]
        fresh = name.removeprefix("resp_")
        documents.kept.setdefault(other, {})[fresh] = documents.kept[own].pop(fresh)
        async with asyncio.timeout(10):
            while (await client.get(f"{PATH}/{name}")).status_code != 404:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert documents.kept[own] == {}

    script = say("yes", delay_s=0.1)
    served(FakeDispatcher(script), use, outliving=Outliving(documents, "router-0", 3600.0, shared=True))
