"""Responses that are kept: found again, gone on from, run in the background, bounded."""

import asyncio
from typing import Any

import httpx

from router.calls.fakes import FakeDispatcher, FakeText, Script, say
from router.dispatch.steps import Output, StepRequest
from router.http.config import ApiConfig
from router.http.keys import Keyring
from tests.unit.router.dialects.asking import NotedText, key_of, served
from tracehaul.wire.errors import PeerLost
from tracehaul.wire.hashing import unpack_tokens

PATH = "/v1/responses"
ASK: dict[str, Any] = {"model": "org/fake", "input": "hi"}


def test_a_response_is_found_again_until_it_is_deleted() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        made = (await client.post(PATH, json=ASK)).json()
        streamed = (await client.post(PATH, json=ASK | {"stream": True})).text
        assert (await client.get(f"{PATH}/{made['id']}")).json() == made
        name = streamed.partition('"id":"')[2].partition('"')[0]
        assert (await client.get(f"{PATH}/{name}")).json()["status"] == "completed"
        gone = await client.delete(f"{PATH}/{made['id']}")
        assert gone.json() == {"id": made["id"], "object": "response", "deleted": True}
        for path in ("", "/input_items"):
            missing = await client.get(f"{PATH}/{made['id']}{path}")
            assert (missing.status_code, missing.json()["error"]["param"]) == (404, "response_id")
        assert (await client.delete(f"{PATH}/{made['id']}")).status_code == 404
        assert (await client.post(f"{PATH}/{made['id']}/cancel")).status_code == 404
        assert (await client.post(f"{PATH}/{name}/cancel")).status_code == 400

    served(FakeDispatcher(say("yes")), use)


def test_what_is_not_stored_is_not_kept() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        made = (await client.post(PATH, json=ASK | {"store": False})).json()
        assert made["store"] is False
        assert (await client.get(f"{PATH}/{made['id']}")).status_code == 404
        after = await client.post(PATH, json=ASK | {"previous_response_id": made["id"]})
        assert (after.status_code, after.json()["error"]["code"]) == (400, "previous_response_not_found")

    served(FakeDispatcher(say("yes")), use)


def test_a_tenant_sees_its_own_only() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        made = (await client.post(PATH, json=ASK | {"cache_salt": "a"})).json()
        own = {"cache_salt": "a"}
        assert (await client.get(f"{PATH}/{made['id']}", params=own)).status_code == 200
        for salt in ({}, {"cache_salt": "b"}):
            for answer in (
                await client.get(f"{PATH}/{made['id']}", params=salt),
                await client.get(f"{PATH}/{made['id']}/input_items", params=salt),
                await client.post(f"{PATH}/{made['id']}/cancel", params=salt),
                await client.delete(f"{PATH}/{made['id']}", params=salt),
            ):
                assert answer.status_code == 404
            after = await client.post(PATH, json=ASK | salt | {"previous_response_id": made["id"]})
            assert after.status_code == 400
        assert (await client.get(f"{PATH}/{made['id']}", params=own)).status_code == 200

    served(FakeDispatcher(say("yes")), use)


def test_a_key_sees_its_own_tenants_only() -> None:
    (one, own), (two, foreign) = key_of("a", 1), key_of("b", 2)

    async def use(client: httpx.AsyncClient) -> None:
        mine, other = {"authorization": f"Bearer {one}"}, {"x-api-key": two}
        assert (await client.post(PATH, json=ASK)).status_code == 401
        path = f"{PATH}/{(await client.post(PATH, json=ASK, headers=mine)).json()['id']}"
        asked = ASK | {"previous_response_id": path.rpartition("/")[2]}
        for headers, status in ((other, 404), (mine, 200)):
            assert (await client.get(path, headers=headers)).status_code == status
            assert (await client.get(f"{path}/input_items", headers=headers)).status_code == status
            after = await client.post(PATH, json=asked, headers=headers)
            assert (after.status_code == 200) == (status == 200)
            counted = await client.post(f"{PATH}/input_tokens", json=asked, headers=headers)
            assert (counted.status_code == 200) == (status == 200)
            assert (await client.delete(path, headers=headers)).status_code == status
        assert (await client.get(path)).status_code == 401

    served(FakeDispatcher(say("yes")), use, keyring=Keyring([own, foreign]))


def test_what_runs_in_the_background_counts_to_its_key() -> None:
    sent, key = key_of("a", 1, tokens_per_minute=20)

    async def use(client: httpx.AsyncClient) -> None:
        client.headers["x-api-key"] = sent
        made = (await client.post(PATH, json=ASK | {"background": True})).json()
        await until(client, made["id"], "completed")
        assert (await client.post(PATH, json=ASK | {"background": True})).status_code == 429

    served(FakeDispatcher(say("yes")), use, keyring=Keyring([key]))


CALL = 'Well.<tool_call>\n{"name": "clock", "arguments": {"z": 1}}\n</tool_call>'


def test_a_response_goes_on_from_another() -> None:
    said = iter([f"<think>\nhm\n</think>\n\n{CALL}", "noon", "bye"])
    dispatcher = FakeDispatcher(lambda request: say(next(said))(request))
    text = NotedText(thinks=True)
    tools = [{"type": "function", "name": "clock", "parameters": {"type": "object"}}]

    async def use(client: httpx.AsyncClient) -> None:
        first = (await client.post(PATH, json=ASK | {"instructions": "one", "tools": tools})).json()
        call = first["output"][-1]
        result = [{"type": "function_call_output", "call_id": call["call_id"], "output": "12"}]
        next_ask = {"model": "org/fake", "input": result, "previous_response_id": first["id"], "instructions": "two"}
        second = await client.post(PATH, json=next_ask | {"tools": tools})
        assert second.json()["previous_response_id"] == first["id"]
        third = {"model": "org/fake", "input": "ok", "previous_response_id": second.json()["id"]}
        await client.post(PATH, json=third)
        made = {"id": call["call_id"], "type": "function", "function": {"name": "clock", "arguments": {"z": 1}}}
        answer = {"role": "assistant", "content": "Well.", "reasoning_content": "hm", "tool_calls": [made]}
        shared = [{"role": "user", "content": "hi"}, answer]
        shared.append({"role": "tool", "content": "12", "tool_call_id": call["call_id"]})
        assert text.rendered[0] == [{"role": "system", "content": "one"}, *shared[:1]]
        assert text.rendered[1] == [{"role": "system", "content": "two"}, *shared]
        later = [{"role": "assistant", "content": "noon"}, {"role": "user", "content": "ok"}]
        assert text.rendered[2] == [*shared, *later]
        one, two, three = dispatcher.requests
        assert one.trace == two.trace == three.trace
        # The middle may go: what followed it keeps what it was.
        await client.delete(f"{PATH}/{first['id']}")
        items = (await client.get(f"{PATH}/{second.json()['id']}/input_items", params={"order": "asc"})).json()
        kinds = [item["type"] for item in items["data"]]
        assert kinds == ["message", "reasoning", "message", "function_call", "function_call_output"]

    served(dispatcher, use, text=text)


def test_items_are_named_instead_of_sent_again() -> None:
    dispatcher = FakeDispatcher(say("<think>\nhm\n</think>\n\nyes"))

    async def use(client: httpx.AsyncClient) -> None:
        first = (await client.post(PATH, json=ASK)).json()
        names = [item["id"] for item in first["output"]]
        items = [{"role": "user", "content": "hi"}, *({"type": "item_reference", "id": name} for name in names)]
        ask = {"model": "org/fake", "input": [*items, {"role": "user", "content": "?"}]}
        second = (await client.post(PATH, json=ask)).json()
        one, two = (FakeText().stream().push(unpack_tokens(request.prompt)) for request in dispatcher.requests)
        assert two.startswith(one)
        assert "yes" in two
        # What was named is kept itself, whatever becomes of where it was.
        await client.delete(f"{PATH}/{first['id']}")
        kept = (await client.get(f"{PATH}/{second['id']}/input_items", params={"order": "asc"})).json()["data"]
        assert [item["type"] for item in kept] == ["message", "reasoning", "message", "message"]
        assert (await client.post(PATH, json=ask)).status_code == 200
        await client.delete(f"{PATH}/{second['id']}")
        for salt in ({}, {"cache_salt": "other"}):
            lost = await client.post(PATH, json=ask | salt | {"store": False})
            assert lost.status_code == (404 if salt else 200)
        assert lost.json()["error"]["param"] == "input[1].id"

    served(dispatcher, use, text=NotedText(thinks=True))


def test_input_items_come_in_pages() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        items: list[dict[str, Any]] = [{"role": "user", "content": f"m{at}"} for at in range(5)]
        items[2] = {"role": "user", "id": "msg_mine", "content": [{"type": "input_text", "text": "m2"}]}
        made = (await client.post(PATH, json=ASK | {"input": items})).json()
        path = f"{PATH}/{made['id']}/input_items"
        seen: list[str] = []
        after: dict[str, str] = {}
        for length, more in ((2, True), (2, True), (1, False)):
            page = (await client.get(path, params={"limit": "2", **after})).json()
            texts = [item["content"][0]["text"] for item in page["data"]]
            assert (len(texts), page["has_more"], page["object"]) == (length, more, "list")
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            seen += texts
            after = {"after": page["last_id"]}
        assert seen == ["m4", "m3", "m2", "m1", "m0"]
        up = (await client.get(path, params={"order": "asc", "after": "msg_mine"})).json()
        assert [item["content"][0]["text"] for item in up["data"]] == ["m3", "m4"]
        end = (await client.get(path, params={"after": after["after"]})).json()
        assert (end["data"], end["first_id"], end["has_more"]) == ([], None, False)
        for name, value in (("order", "up"), ("limit", "0"), ("limit", "101"), ("limit", "x"), ("after", "msg_x")):
            wrong = await client.get(path, params={name: value})
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, name)

    served(FakeDispatcher(say("yes")), use)


async def until(client: httpx.AsyncClient, name: str, *statuses: str) -> dict[str, Any]:
    while True:
        body = (await client.get(f"{PATH}/{name}")).json()
        if body["status"] in statuses:
            return body
        await asyncio.sleep(0.001)


def test_a_response_in_the_background_is_polled() -> None:
    dispatcher = FakeDispatcher(say("yes", delay_s=0.005))

    async def use(client: httpx.AsyncClient) -> None:
        made = (await client.post(PATH, json=ASK | {"background": True})).json()
        assert (made["status"], made["output"], made["background"]) == ("queued", [], True)
        early = await client.post(PATH, json=ASK | {"previous_response_id": made["id"]})
        assert early.json()["error"]["code"] == "previous_response_not_completed"
        await until(client, made["id"], "in_progress")
        done = await until(client, made["id"], "completed")
        assert done["output"][0]["content"][0]["text"] == "yes"
        assert done["usage"]["output_tokens"] == 4
        again = await client.post(f"{PATH}/{made['id']}/cancel")
        assert again.json() == done
        after = await client.post(PATH, json=ASK | {"previous_response_id": made["id"]})
        assert after.status_code == 200

    served(dispatcher, use)


def test_what_runs_in_the_background_is_cancelled_or_deleted() -> None:
    dispatcher = FakeDispatcher(lambda _: [Output([97]), 60.0])

    async def use(client: httpx.AsyncClient) -> None:
        ended = []
        for way in ("cancel at once", "cancel", "delete"):
            made = (await client.post(PATH, json=ASK | {"background": True})).json()
            if way != "cancel at once":
                await until(client, made["id"], "in_progress")
            if way == "delete":
                assert (await client.delete(f"{PATH}/{made['id']}")).status_code == 200
                assert (await client.get(f"{PATH}/{made['id']}")).status_code == 404
            else:
                body = (await client.post(f"{PATH}/{made['id']}/cancel")).json()
                assert (body["status"], body["id"]) == ("cancelled", made["id"])
                assert (await client.get(f"{PATH}/{made['id']}")).json() == body
                ended.append(body)
        assert dispatcher.running == 0

    served(dispatcher, use)


def test_what_fails_in_the_background_says_so() -> None:
    def script(request: StepRequest) -> Script:
        return [Output([97]), PeerLost("gone")]

    async def use(client: httpx.AsyncClient) -> None:
        made = (await client.post(PATH, json=ASK | {"background": True})).json()
        failed = await until(client, made["id"], "failed")
        assert failed["error"] == {"code": "server_error", "message": "gone"}
        long = (await client.post(PATH, json=ASK | {"background": True, "input": "x" * 5000})).json()
        failed = await until(client, long["id"], "failed")
        assert failed["error"]["code"] == "context_length_exceeded"

    served(FakeDispatcher(script), use)


def test_the_background_is_bounded() -> None:
    dispatcher = FakeDispatcher(lambda _: [60.0])

    async def use(client: httpx.AsyncClient) -> None:
        answers = [await client.post(PATH, json=ASK | {"background": True}) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 503]
        assert (await client.post(f"{PATH}/{answers[0].json()['id']}/cancel")).status_code == 200
        assert (await client.post(PATH, json=ASK | {"background": True})).status_code == 200

    served(dispatcher, use, config=ApiConfig(background_max=2))


def test_a_tenant_leaves_as_many_places_in_the_background_as_it_has() -> None:
    sents, keys = zip(*(key_of(tenant, at) for at, tenant in enumerate("aabc")), strict=True)

    async def use(client: httpx.AsyncClient) -> None:
        async def begin(sent: str) -> httpx.Response:
            return await client.post(PATH, json=ASK | {"background": True}, headers={"x-api-key": sent})

        # Both of the first tenant's keys count.
        first = [await begin(sents[at % 2]) for at in range(5)]
        assert [answer.status_code for answer in first] == [200] * 4 + [429]
        assert first[-1].json()["error"]["code"] == "rate_limit_exceeded"
        assert [(await begin(sents[2])).status_code for _ in range(3)] == [200, 200, 429]
        assert [(await begin(sents[3])).status_code for _ in range(2)] == [200, 429]
        path = f"{PATH}/{first[0].json()['id']}/cancel"
        assert (await client.post(path, headers={"x-api-key": sents[1]})).status_code == 200
        assert (await begin(sents[3])).status_code == 200

    served(FakeDispatcher(lambda _: [60.0]), use, config=ApiConfig(background_max=8), keyring=Keyring(keys))


def test_what_runs_in_the_background_runs_at_once_with_others() -> None:
    sent, key = key_of("a", 1, concurrency=2)

    async def use(client: httpx.AsyncClient) -> None:
        client.headers["x-api-key"] = sent
        made = [await client.post(PATH, json=ASK | {"background": True}) for _ in range(3)]
        assert [answer.status_code for answer in made] == [200, 200, 429]
        assert (await client.post(PATH, json=ASK)).status_code == 429
        assert (await client.post(f"{PATH}/{made[0].json()['id']}/cancel")).status_code == 200
        assert (await client.post(f"{PATH}/{made[1].json()['id']}/cancel")).status_code == 200
        assert (await client.post(f"{PATH}/input_tokens", json=ASK)).status_code == 200

    served(FakeDispatcher(lambda _: [60.0]), use, keyring=Keyring([key]))


def test_old_responses_go_where_there_are_too_many() -> None:
    async def use(client: httpx.AsyncClient) -> None:
        names = [(await client.post(PATH, json=ASK)).json()["id"] for _ in range(3)]
        found = [(await client.get(f"{PATH}/{name}")).status_code for name in names]
        assert found == [404, 200, 200]

    served(FakeDispatcher(say("yes")), use, config=ApiConfig(responses_max=2))


def test_input_tokens_are_counted() -> None:
    dispatcher = FakeDispatcher(say("yes"))

    async def use(client: httpx.AsyncClient) -> None:
        made = (await client.post(PATH, json=ASK)).json()
        ask = {"model": "org/fake", "input": "more", "previous_response_id": made["id"]}
        counted = (await client.post(f"{PATH}/input_tokens", json=ask)).json()
        used = (await client.post(PATH, json=ask)).json()["usage"]["input_tokens"]
        assert counted == {"object": "response.input_tokens", "input_tokens": used}
        assert used > made["usage"]["input_tokens"]
        wrong = await client.post(f"{PATH}/input_tokens", json=ask | {"input": 1})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "input")

    served(dispatcher, use)
    prompt = FakeText().stream().push(unpack_tokens(dispatcher.requests[-1].prompt))
    assert "hi" in prompt
    assert "yes" in prompt
