"""Chat completions that are kept, asked over HTTP."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import httpx
import pytest

from records.documents import Document, Shelf
from records.fakes import MemoryDocuments
from router.calls.fakes import FakeDispatcher, say
from router.http import chats
from router.http.chats import Chats, ChatStats
from router.http.config import ApiConfig
from router.http.keys import Keyring
from tests.unit.router.dialects.asking import key_of, served

PATH = "/v1/chat/completions"
ASKED: Any = {"messages": [{"role": "user", "content": "hi"}]}
Use = Callable[[httpx.AsyncClient], Awaitable[None]]


class Kept:
    """An application that keeps them, in memory."""

    def __init__(self, config: ApiConfig | None = None, keyring: Keyring | None = None) -> None:
        self.documents, self.stats = MemoryDocuments(), ChatStats()
        self.config, self.keyring = config or ApiConfig(), keyring
        self.dispatcher = FakeDispatcher(say("héllo"))

    def use(self, use: Use) -> None:
        made = Chats(self.documents, self.config, self.stats)
        served(self.dispatcher, use, config=self.config, keyring=self.keyring, chats=made)


async def made(client: httpx.AsyncClient, headers: Mapping[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json=ASKED | {"store": True} | fields, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def got(client: httpx.AsyncClient, at: str, **query: Any) -> Any:
    answer = await client.get(PATH + at, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_one_is_kept_told_changed_and_forgotten() -> None:
    kept = Kept()

    async def use(client: httpx.AsyncClient) -> None:
        told = await made(client, metadata={"run": "1"}, temperature=0.5, seed=7, user="me")
        assert told["store"] is True
        name = told["id"]
        again = await got(client, f"/{name}")
        assert {key: again[key] for key in told if key != "store"} == {k: v for k, v in told.items() if k != "store"}
        assert again["metadata"] == {"run": "1"}
        assert (again["temperature"], again["seed"], again["input_user"]) == (0.5, 7, "me")
        assert again["request_id"]
        changed = (await client.post(f"{PATH}/{name}", json={"metadata": {"run": "2"}})).json()
        assert changed == again | {"metadata": {"run": "2"}} == await got(client, f"/{name}")
        assert (await client.post(f"{PATH}/{name}", json={"metadata": None})).json()["metadata"] == {}
        gone = await client.delete(f"{PATH}/{name}")
        assert gone.json() == {"id": name, "deleted": True, "object": "chat.completion.deleted"}
        for answer in (
            await client.get(f"{PATH}/{name}"),
            await client.get(f"{PATH}/{name}/messages"),
            await client.delete(f"{PATH}/{name}"),
            await client.post(f"{PATH}/{name}", json={"metadata": {}}),
        ):
            assert (answer.status_code, answer.json()["error"]["param"]) == (404, "completion_id")

    kept.use(use)
    assert kept.stats == ChatStats(kept=1)


@pytest.mark.parametrize("fields", [{}, {"store": False}, {"store": None}])
def test_what_is_not_to_be_kept_is_not(fields: dict[str, Any]) -> None:
    kept = Kept()

    async def use(client: httpx.AsyncClient) -> None:
        answer = (await client.post(PATH, json=ASKED | fields)).json()
        assert "store" not in answer
        assert (await client.get(f"{PATH}/{answer['id']}")).status_code == 404

    kept.use(use)
    assert kept.documents.kept.get(Shelf("chat", ""), {}) == {}


def test_a_stream_is_kept_by_its_end() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        text = (await client.post(PATH, json=ASKED | {"store": True, "stream": True, "n": 2})).text
        chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        assert not any("store" in chunk for chunk in chunks)
        again = await got(client, f"/{chunks[0]['id']}")
        assert [choice["message"]["content"] for choice in again["choices"]] == ["héllo"] * 2
        assert again["usage"]["completion_tokens"] > 0
        assert again["object"] == "chat.completion"

    Kept().use(use)


def test_messages_are_told_again_as_they_were_asked() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    asked = [
        {"role": "developer", "content": "be brief", "name": "boss"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]

    async def use(client: httpx.AsyncClient) -> None:
        name = (await made(client, messages=asked))["id"]
        page = await got(client, f"/{name}/messages")
        told = page["data"]
        assert [each["id"] for each in told] == [f"{name}-{at}" for at in range(4)]
        assert (page["first_id"], page["last_id"], page["has_more"]) == (f"{name}-0", f"{name}-3", False)
        assert (told[0]["role"], told[0]["content"], told[0]["name"]) == ("developer", "be brief", "boss")
        assert told[1]["content"] == "one two"
        assert [part["text"] for part in told[1]["content_parts"]] == ["one ", "two"]
        assert told[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
        assert (told[3]["tool_call_id"], told[3]["content"]) == ("c1", "3")
        page = await got(client, f"/{name}/messages", order="desc", limit=2, after=f"{name}-3")
        assert ([each["id"][-1] for each in page["data"]], page["has_more"]) == (["2", "1"], True)
        assert (await client.get(f"{PATH}/{name}/messages", params={"after": "x"})).status_code == 400

    Kept().use(use)


def test_lists_are_filtered_and_paged() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        names = [(await made(client, metadata={"parity": str(at % 2), "at": str(at)}))["id"] for at in range(5)]
        page = await got(client, "", limit=2)
        assert ([each["id"] for each in page["data"]], page["has_more"]) == (names[:2], True)
        assert (page["first_id"], page["last_id"]) == (names[0], names[1])
        page = await got(client, "", limit=3, after=names[1])
        assert ([each["id"] for each in page["data"]], page["has_more"]) == (names[2:], False)
        page = await got(client, "", order="desc", limit=2, **{"metadata[parity]": "0"})
        assert ([each["id"] for each in page["data"]], page["has_more"]) == ([names[4], names[2]], True)
        assert page["data"][0]["metadata"] == {"parity": "0", "at": "4"}
        assert [e["id"] for e in (await got(client, "", model="org/fake", **{"metadata[at]": "3"}))["data"]] == names[
            3:4
        ]
        empty = await got(client, "", model="other")
        assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
        for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "unknown"}):
            assert (await client.get(PATH, params=wrong)).status_code == 400

    Kept().use(use)


def test_a_tenant_sees_its_own() -> None:
    (one, first), (two, second) = key_of("red", 1), key_of("blue", 2)

    async def use(client: httpx.AsyncClient) -> None:
        red, blue = {"x-api-key": one}, {"x-api-key": two}
        name = (await made(client, red))["id"]
        assert (await client.get(f"{PATH}/{name}", headers=red)).status_code == 200
        for answer in (
            await client.get(f"{PATH}/{name}", headers=blue),
            await client.get(f"{PATH}/{name}/messages", headers=blue),
            await client.post(f"{PATH}/{name}", headers=blue, json={"metadata": {}}),
            await client.delete(f"{PATH}/{name}", headers=blue),
        ):
            assert answer.status_code == 404
        assert (await client.get(PATH, headers=blue)).json()["data"] == []
        assert (await client.get(PATH, headers=blue, params={"after": name})).status_code == 400
        assert len((await client.get(PATH, headers=red)).json()["data"]) == 1
        assert (await client.get(PATH)).status_code == 401

    Kept(keyring=Keyring([first, second])).use(use)


@pytest.mark.parametrize(
    "metadata", [{"a": 1}, {"a": "x" * 513}, {"k" * 65: "x"}, {f"k{at}": "x" for at in range(17)}, {"a": None}]
)
def test_metadata_that_cannot_be_kept_is_refused(metadata: Any) -> None:
    kept = Kept()

    async def use(client: httpx.AsyncClient) -> None:
        refused = await client.post(PATH, json=ASKED | {"store": True, "metadata": metadata})
        assert (refused.status_code, refused.json()["error"]["param"].split(".")[0]) == (400, "metadata")
        assert (await client.post(PATH, json=ASKED | {"metadata": metadata})).status_code == 200
        name = (await made(client))["id"]
        assert (await client.post(f"{PATH}/{name}", json={"metadata": metadata})).status_code == 400

    kept.use(use)


def test_a_database_that_is_away_costs_what_was_to_be_kept_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "AGAIN_S", 0.05)
    kept = Kept()

    async def use(client: httpx.AsyncClient) -> None:
        before = (await made(client))["id"]
        kept.documents.lost = "the disk is full"
        told = await made(client)
        assert (told["store"], told["choices"][0]["message"]["content"]) == (None, "héllo")
        for answer in (await client.get(PATH), await client.get(f"{PATH}/{before}")):
            assert answer.status_code == 503
            assert "the disk is full" in answer.text
        kept.documents.lost = None
        assert (await made(client))["store"] is None, "not asked again at once"
        await asyncio.sleep(0.06)
        assert (await made(client))["store"] is True
        assert len((await got(client, ""))["data"]) == 2

    kept.use(use)
    assert kept.stats == ChatStats(kept=2, not_kept=2)


def test_one_that_takes_too_long_to_keep_is_answered_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "KEEP_S", 0.05)
    kept = Kept()

    async def frozen(shelf: Shelf, document: Document) -> None:
        await asyncio.Event().wait()

    kept.documents.put = frozen

    async def use(client: httpx.AsyncClient) -> None:
        assert (await made(client))["store"] is None

    kept.use(use)


def test_without_a_place_to_keep_them_that_is_said() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        assert (await made(client))["store"] is None
        assert (await client.get(PATH)).status_code == 405

    served(FakeDispatcher(say("hi")), use)


def test_beyond_a_limit_the_oldest_of_whoever_has_most_go() -> None:
    kept = Kept(ApiConfig(chats_max=3))

    async def use(client: httpx.AsyncClient) -> None:
        lonely = (await made(client, cache_salt="red"))["id"]
        names = [(await made(client))["id"] for _ in range(4)]
        store = Chats(kept.documents, kept.config, kept.stats)
        assert await store.keep("", "chatcmpl-last", {"model": "m"}, b"{}")
        trimmed, trim = asyncio.Event(), kept.documents.trim

        async def trimming(*limits: Any) -> int:
            trimmed.set()
            return await trim(*limits)

        kept.documents.trim = trimming
        sweeping = asyncio.create_task(store.sweep())
        await trimmed.wait()
        await asyncio.sleep(0)
        sweeping.cancel()
        assert set(kept.documents.kept[Shelf("chat", "")]) == {names[-1], "chatcmpl-last"}
        assert list(kept.documents.kept[Shelf("chat", "red")]) == [lonely]

    kept.use(use)
    assert kept.stats.forgotten == 3
