"""``DELETE /v1/data``: nothing is left of a tenant, and all of the others."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from cluster.api import Api
from cluster.erase import Erased, erase
from cluster.rundir import ClusterFault
from jobs.files import FileLimits
from jobs.folder.files import FolderFiles
from records.documents import Shelf
from records.fakes import MemoryDocuments
from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dispatch.steps import Output, StepRequest
from router.http.app import create_app
from router.http.chats import KIND, Chats, ChatStats
from router.http.config import ApiConfig
from router.http.jobs import Jobs
from router.http.outliving import Outliving
from sim.lifespan import living
from tests.folder_jobs import folder_batches
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.hashing import unpack_tokens

ASK: dict[str, Any] = {"model": "org/fake", "input": "hi"}
TALK: dict[str, Any] = {"model": "org/fake", "messages": [{"role": "user", "content": "hi"}], "store": True}
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {**TALK, "store": False}}
OFFLOAD = InlineOffload()


def script(request: StepRequest) -> Script:
    prompt = FakeText().stream().push(unpack_tokens(request.prompt))
    return [Output([97]), 60.0] if "slow" in prompt else say("yes")(request)


async def fill(client: httpx.AsyncClient, tenant: str) -> None:
    """Two of each, one of them runs where that can be."""
    own = {"cache_salt": tenant}
    for text in ("hi", "slow"):
        asked = ASK | own | {"input": text, "background": True}
        (await client.post("/v1/responses", json=asked)).raise_for_status()
        (await client.post("/v1/chat/completions", json=TALK | own)).raise_for_status()
        line = msgspec.json.encode(LINE) + b"\n"
        form = {"data": {"purpose": "batch"}, "files": {"file": ("in", line)}}
        file = (await client.post("/v1/files", params=own, **form)).raise_for_status().json()["id"]
        batch = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        (await client.post("/v1/batches", params=own, json=batch)).raise_for_status()


async def left(client: httpx.AsyncClient, tenant: str) -> list[int]:
    """How many of each there are to be seen."""
    pages = ("/v1/batches", "/v1/files", "/v1/chat/completions")
    return [len((await client.get(page, params={"cache_salt": tenant})).json()["data"]) for page in pages]


def test_all_of_a_tenant_is_erased_and_nothing_of_another(tmp_path: Path) -> None:
    documents, chats = MemoryDocuments(), MemoryDocuments()

    async def main() -> None:
        files = FolderFiles(tmp_path / "files", FileLimits(), OFFLOAD)
        batches = folder_batches(tmp_path / "batches", files, OFFLOAD, 10)
        app = create_app(
            FakeDispatcher(script),
            {"org/fake": FakeText()},
            lambda: b"",
            ApiConfig(),
            OFFLOAD,
            jobs=Jobs(files, batches),
            chats=Chats(chats, ApiConfig(), ChatStats()),
            outliving=Outliving(documents, "router-0", 3600.0),
        )
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with (
            asyncio.timeout(20),
            living(app),
            httpx.AsyncClient(transport=transport, base_url="http://t") as client,
        ):
            await fill(client, "crimson")
            await fill(client, "blue")
            pages = {"cache_salt": "blue"}
            while (await client.get("/v1/batches", params=pages)).text.count('"status":"completed"') < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            blue = await left(client, "blue")
            gone = (await client.delete("/v1/data", params={"cache_salt": "crimson"})).json()
            kinds = ("responses", "chat_completions", "batches", "deleted")
            assert [gone[kind] for kind in kinds] == [2, 2, 2, True]
            assert gone["files"] >= 2, "results, too"
            assert await left(client, "crimson") == [0, 0, 0]
            assert await left(client, "blue") == blue
            again = (await client.delete("/v1/data", params={"cache_salt": "crimson"})).json()
            assert [again[kind] for kind in kinds] == [0, 0, 0, True]
        files.close()

    asyncio.run(main())
    said = b"".join(each.body for each in documents.kept[Shelf("background", "router-0")].values())
    assert b"crimson" not in said
    assert len(documents.kept[Shelf("background", "router-0")]) == 2
    assert not chats.kept[Shelf(KIND, "crimson")]
    told = b"".join(path.read_bytes() for path in tmp_path.rglob("*.json"))
    assert b'"crimson"' not in told
    assert b'"blue"' in told


def test_the_command_says_what_a_router_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [
        httpx.Response(200, json={"traces": 1, "responses": 2, "chat_completions": 3, "batches": 4, "files": 5}),
        httpx.Response(503, json={"error": {"message": "ask again"}}),
    ]

    def client(self: Api, timeout_s: float) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(lambda request: answers.pop(0)), base_url=self.url)

    monkeypatch.setattr(Api, "client", client)
    apis = [Api("http://one"), Api("http://two")]
    assert erase(apis[:1], "crimson") == [("http://one", Erased(1, 2, 3, 4, 5))]
    with pytest.raises(ClusterFault, match="http://two has not erased all of it: ask again"):
        erase(apis[1:], "crimson")
