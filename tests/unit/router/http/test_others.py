"""Several routers that know of each other: what any of them keeps is found, listed, ended and deleted at each."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from starlette.types import ASGIApp

from cluster.kept_jobs import opened_jobs
from jobs.files import File
from jobs.folder.files import FolderFiles
from records.documents import Shelf
from records.fakes import MemoryDocuments
from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dispatch.steps import Output, StepRequest
from router.http import erasures
from router.http import others as rooms
from router.http.app import create_app
from router.http.config import ApiConfig
from router.http.erasures import Erasure, Erasures
from router.http.keys import Keyring
from router.http.others import Others, answered
from router.http.outliving import Outliving
from sim.lifespan import living
from tests.unit.router.dialects.asking import key_of
from tests.unit.router.http.test_erasing import ASK, LINE
from tracehaul.runtime.clock import wall_s
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.cluster import AskRouter
from tracehaul.wire.errors import PeerLost
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.messages import Reply

OFFLOAD = InlineOffload()
NAMES = ("one", "two", "three")


class Wire:
    """Peers: asks the other applications, unless these do not answer."""

    def __init__(self) -> None:
        self.apps: dict[str, ASGIApp] = {}
        self.away: set[str] = set()
        self.unsure = False
        """Nobody knows who lives."""
        self.lives: set[str] = set(NAMES)
        self.asked: list[tuple[str, AskRouter]] = []

    def beside(self, name: str) -> Callable[[], Mapping[str, str] | None]:
        return lambda: None if self.unsure else {each: f"{each}:7" for each in sorted(self.lives - {name})}

    async def call(self, address: str, request: AskRouter | Ping, *, timeout_s: float) -> Reply:
        name = address.removesuffix(":7")
        if name in self.away:
            raise PeerLost("nobody listens there")
        if isinstance(request, Ping):
            return Ok()
        self.asked.append((name, request))
        return await answered(self.apps[name], request)


def script(request: StepRequest) -> Script:
    prompt = FakeText().stream().push(unpack_tokens(request.prompt))
    return [Output([97]), 60.0] if "slow" in prompt else say("yes")(request)


def served(
    folder: Path,
    use: Callable[[Wire, Mapping[str, httpx.AsyncClient]], Awaitable[None]],
    keyring: Keyring | None = None,
) -> None:
    """Three routers with a folder and a database in common."""

    async def main() -> None:
        wire, documents, clients = Wire(), MemoryDocuments(), dict[str, httpx.AsyncClient]()
        async with asyncio.timeout(60), AsyncExitStack() as stack:
            for name in NAMES:
                jobs = await stack.enter_async_context(opened_jobs(folder / name, ApiConfig()))
                app = wire.apps[name] = create_app(
                    FakeDispatcher(script),
                    {"org/fake": FakeText()},
                    lambda: b"",
                    ApiConfig(),
                    OFFLOAD,
                    keyring=keyring,
                    jobs=jobs,
                    outliving=Outliving(documents, name, 3600.0, shared=True),
                    others=Others(wire.beside(name), wire),  # type: ignore[arg-type]
                )
                await stack.enter_async_context(living(app))
                transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
                client = httpx.AsyncClient(transport=transport, base_url=f"http://{name}")
                clients[name] = await stack.enter_async_context(client)
            await use(wire, clients)

    asyncio.run(main())


async def upload(client: httpx.AsyncClient, text: str = "hi", **more: Any) -> str:
    body = {"model": "org/fake", "messages": [{"role": "user", "content": text}]}
    data = msgspec.json.encode(LINE | {"body": body}) + b"\n"
    form: dict[str, Any] = {"data": {"purpose": "batch"}, "files": {"file": ("in", data)}}
    return (await client.post("/v1/files", **form, **more)).raise_for_status().json()["id"]


async def batch(client: httpx.AsyncClient, file: str, **more: Any) -> str:
    asked = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return (await client.post("/v1/batches", json=asked, **more)).raise_for_status().json()["id"]


async def status(client: httpx.AsyncClient, name: str, *wanted: str) -> dict[str, Any]:
    while (found := (await client.get(f"/v1/batches/{name}")).raise_for_status().json())["status"] not in wanted:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    return found


def test_a_batch_of_one_router_is_made_read_and_cancelled_at_another(tmp_path: Path) -> None:
    async def use(wire: Wire, at: Mapping[str, httpx.AsyncClient]) -> None:
        file = await upload(at["one"])
        name = await batch(at["two"], file)  # which another has
        done = await status(at["three"], name, "completed")
        output = await at["three"].get(f"/v1/files/{done['output_file_id']}/content")
        assert output.status_code == 200
        assert msgspec.json.decode(output.content)["custom_id"] == "a"
        assert output.headers["content-disposition"] == "attachment"
        slow = await batch(at["one"], await upload(at["one"], "slow"))
        await status(at["one"], slow, "in_progress")
        assert (await at["two"].post(f"/v1/batches/{slow}/cancel")).json()["status"] == "cancelling"
        await status(at["one"], slow, "cancelled")
        assert (await at["two"].delete(f"/v1/files/{file}")).json()["deleted"]
        assert (await at["one"].get(f"/v1/files/{file}")).status_code == 404
        assert (await at["three"].get("/v1/batches/batch_none")).status_code == 404

    served(tmp_path, use)


def test_a_long_file_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "PIECE_BYTES", 100_000)
    data, starts, opened = bytes(range(256)) * 4000, list[int](), FolderFiles.open

    async def opening(self: FolderFiles, file: File, start: int = 0) -> AsyncGenerator[bytes]:
        starts.append(start)
        return await opened(self, file, start)

    monkeypatch.setattr(FolderFiles, "open", opening)

    async def use(wire: Wire, at: Mapping[str, httpx.AsyncClient]) -> None:
        form: dict[str, Any] = {"data": {"purpose": "user_data"}, "files": {"file": ("in", data)}}
        name = (await at["one"].post("/v1/files", **form)).json()["id"]
        wire.asked.clear()
        assert (await at["two"].get(f"/v1/files/{name}/content")).content == data
        assert sum(router == "one" for router, _ in wire.asked) == len(data) // 100_000 + 1
        assert starts == list(range(0, len(data), 100_000)), "none is read twice"

    served(tmp_path, use)


def test_lists_have_what_all_routers_keep_page_by_page(tmp_path: Path) -> None:
    async def use(wire: Wire, at: Mapping[str, httpx.AsyncClient]) -> None:
        made = [await upload(at[name]) for _ in range(4) for name in NAMES]
        for order in ("asc", "desc"):
            whole = (await at["two"].get("/v1/files", params={"order": order})).json()
            names = [each["id"] for each in whole["data"]]
            assert sorted(names) == sorted(made)
            assert not whole["has_more"]
            assert [each["created_at"] for each in whole["data"]] == sorted(
                (each["created_at"] for each in whole["data"]), reverse=order == "desc"
            )
            paged, after = list[str](), dict[str, str]()
            for turn in range(20):
                page = (await at[NAMES[turn % 3]].get("/v1/files", params={"order": order, "limit": 5, **after})).json()
                paged += [each["id"] for each in page["data"]]
                assert page["last_id"] == paged[-1]
                if not page["has_more"]:
                    break
                after = {"after": paged[-1]}
            assert paged == names
        for after in ("file-none", "", f"{made[1]}/content"):
            assert (await at["one"].get("/v1/files", params={"after": after})).status_code == 400
        name = await batch(at["one"], made[0])
        assert [each["id"] for each in (await at["three"].get("/v1/batches")).json()["data"]] == [name]

    served(tmp_path, use)


def test_a_router_that_lives_and_cannot_be_asked_is_no_reason_to_say_that_there_is_nothing(tmp_path: Path) -> None:
    async def use(wire: Wire, at: Mapping[str, httpx.AsyncClient]) -> None:
        file = await upload(at["one"])
        wire.away = {"one"}
        for path in (f"/v1/files/{file}", "/v1/files"):
            answer = await at["two"].get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "router_unavailable")
        own = await upload(at["two"])
        assert (await at["two"].get(f"/v1/files/{own}")).status_code == 200
        wire.lives = {"two", "three"}
        assert (await at["two"].get(f"/v1/files/{file}")).status_code == 503, "it has its folder still"
        assert (await at["two"].get("/v1/responses/resp_none")).status_code == 404
        assert [each["id"] for each in (await at["two"].get("/v1/files")).json()["data"]] == [own]

    served(tmp_path, use)


def test_a_response_of_another_router_is_told_ended_and_deleted(tmp_path: Path) -> None:
    async def use(wire: Wire, at: Mapping[str, httpx.AsyncClient]) -> None:
        done = (await at["one"].post("/v1/responses", json=ASK)).json()
        assert (await at["two"].get(f"/v1/responses/{done['id']}")).json()["output"] == done["output"]
        items = (await at["two"].get(f"/v1/responses/{done['id']}/input_items")).json()["data"]
        assert items[0]["content"][0]["text"] == "hi"
        slow = (await at["one"].post("/v1/responses", json=ASK | {"input": "slow", "background": True})).json()["id"]
        assert (await at["two"].post(f"/v1/responses/{slow}/cancel")).json()["status"] == "cancelled"
        assert (await at["two"].delete(f"/v1/responses/{done['id']}")).status_code == 200
        assert (await at["one"].get(f"/v1/responses/{done['id']}")).status_code == 404

    served(tmp_path, use)


def test_a_tenant_is_erased_at_all_routers_and_of_those_that_are_gone(tmp_path: Path) -> None:
    own: dict[str, Any] = {"params": {"cache_salt": "crimson"}}

    async def use(wire: Wire, at: Mapping[str, httpx.AsyncClient]) -> None:
        for name in NAMES:
            await batch(at[name], await upload(at[name], "slow", **own), **own)
            asked = ASK | {"cache_salt": "crimson", "input": "slow", "background": True}
            (await at[name].post("/v1/responses", json=asked)).raise_for_status()
            await upload(at[name])
        gone = (await at["two"].delete("/v1/data", **own)).json()
        assert [gone[kind] for kind in ("responses", "batches", "files")] == [3, 3, 6]
        for name in NAMES:
            assert (await at[name].get("/v1/files", **own)).json()["data"] == []
            assert len((await at[name].get("/v1/files")).json()["data"]) == 3
        wire.away = {"one"}
        assert (await at["two"].delete("/v1/data", **own)).status_code == 503
        wire.lives = {"two", "three"}
        await upload(at["one"], **own)
        answer = await at["two"].delete("/v1/data", **own)
        assert answer.status_code == 503, "it has its folder still, and may go on"
        assert "one" in answer.json()["error"]["message"]

    served(tmp_path, use)
    told = b"".join(path.read_bytes() for name in ("two", "three") for path in (tmp_path / name).rglob("*.json"))
    assert b'"crimson"' not in told

    async def erased() -> None:
        async with opened_jobs(tmp_path / "two", ApiConfig()) as jobs:
            assert jobs is not None
            assert jobs.erase_left is not None
            assert await jobs.erase_left("crimson", ["three"]) == (0, 1)

    asyncio.run(erased())
    assert b'"crimson"' not in b"".join(path.read_bytes() for path in tmp_path.rglob("*.json"))


def test_who_asks_by_another_router_may_no_more_than_there(tmp_path: Path) -> None:
    (red, red_key), (blue, blue_key) = key_of("red", 1), key_of("blue", 2)

    async def use(wire: Wire, at: Mapping[str, httpx.AsyncClient]) -> None:
        mine: dict[str, Any] = {"headers": {"authorization": f"Bearer {red}"}}
        theirs: dict[str, Any] = {"headers": {"authorization": f"Bearer {blue}"}}
        file = await upload(at["one"], **mine)
        assert (await at["two"].get(f"/v1/files/{file}", **mine)).status_code == 200
        assert (await at["two"].get(f"/v1/files/{file}", **theirs)).status_code == 404
        assert (await at["two"].get(f"/v1/files/{file}")).status_code == 401
        assert (await at["two"].get("/v1/files", **theirs)).json()["data"] == []
        asked = AskRouter("GET", f"/v1/files/{file}", b"", ())
        assert (await answered(wire.apps["one"], asked)).status == 401

    served(tmp_path, use, Keyring((red_key, blue_key)))


def test_who_was_not_told_erases_it_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasures, "LOOK_S", 0.01)
    own: dict[str, Any] = {"params": {"cache_salt": "crimson"}}

    async def use(wire: Wire, at: Mapping[str, httpx.AsyncClient]) -> None:
        asks = [ASK | {"cache_salt": "crimson"}, ASK]
        said = [(await at["one"].post("/v1/responses", json=ask)).json()["id"] for ask in asks]
        wire.lives = {"two", "three"}  # it stands still
        assert (await at["two"].delete("/v1/data", **own)).status_code == 200
        asked = wire.asked.copy()
        wire.lives = set(NAMES)
        async with asyncio.timeout(10):
            while (await at["one"].get(f"/v1/responses/{said[0]}", **own)).status_code != 404:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert (await at["one"].get(f"/v1/responses/{said[1]}")).status_code == 200
        assert all(name == "three" for name, _ in asked)
        new = (await at["three"].post("/v1/responses", json=ASK | {"cache_salt": "crimson"})).json()["id"]
        await asyncio.sleep(0.1)
        assert (await at["three"].get(f"/v1/responses/{new}", **own)).status_code == 200, "it has done it, and once"

    served(tmp_path, use)


def test_who_erases_late_leaves_what_was_made_since_and_what_others_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: dict[str, Any] = {"params": {"cache_salt": "crimson"}}
    late, database = dict[str, Callable[[Erasure, float], Awaitable[None]]](), list[MemoryDocuments]()

    async def run(self: Erasures, erase: Callable[[Erasure, float], Awaitable[None]]) -> None:
        late[self._router] = erase
        database.append(self._documents)  # type: ignore[arg-type]
        self._known.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Erasures, "run", run)

    async def use(wire: Wire, at: Mapping[str, httpx.AsyncClient]) -> None:
        ask = ASK | {"cache_salt": "crimson", "input": "slow", "background": True}
        for name in NAMES:
            await batch(at[name], await upload(at[name], "slow", **own), **own)
            (await at[name].post("/v1/responses", json=ask)).raise_for_status()

        async def left() -> list[int]:
            kept = database[0].kept
            pages = [
                (await at["one"].get(f"/v1/{kind}", **own)).json()["data"] for kind in ("files", "batches", "traces")
            ]
            return [*map(len, pages), *(len(kept[Shelf("background", name)]) for name in NAMES)]

        assert await left() == [3, 3, 1, 1, 1, 1]
        for erasure in (Erasure("crimson", all=True), Erasure("crimson")):
            await late["one"](erasure, wall_s() - 60)
            assert await left() == [3, 3, 1, 1, 1, 1], "it is newer"
        await late["one"](Erasure("crimson", all=True), wall_s())
        assert await left() == [2, 2, 0, 0, 1, 1]

    served(tmp_path, use)


def test_what_was_erased_while_a_router_was_gone_it_erases_before_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasures, "LOOK_S", 0.01)
    documents, gone = MemoryDocuments(), list[Erasure]()

    async def erase(erasure: Erasure, at_s: float) -> None:
        assert abs(at_s - wall_s()) < 60
        gone.append(erasure)

    async def life(*noted: Erasure) -> None:
        one = Erasures(documents, "one")
        running = asyncio.create_task(one.run(erase))
        await one.caught_up()
        for erasure in noted:
            await one.note(erasure)  # under way
            await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.wait([running])

    async def main() -> None:
        other = Erasures(documents, "two")
        await other.note(Erasure("early"))  # before it was there
        await life(Erasure("own"))
        await other.note(Erasure("crimson", all=True))
        await other.note(Erasure("blue", trace="a"))
        await life()
        await life()

    asyncio.run(main())
    assert gone == [Erasure("crimson", all=True), Erasure("blue", trace="a")]
