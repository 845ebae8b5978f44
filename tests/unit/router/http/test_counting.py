"""A conversation is counted as its call would be rendered: in its trace, with what was generated there."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from router.calls.fakes import FakeDispatcher, FakeText, say
from router.dispatch.steps import StepRequest
from router.http.keys import Keyring
from tests.unit.router.dialects.asking import key_of, served
from tests.unit.router.http.test_verbatim import CALL, DATED, TEMPLATE, TOOL, USER, Message, Talk, spelled, text
from tracehaul.wire.hashing import unpack_tokens

NAMED, UNNAMED = {"x-trace-id": "t"}, dict[str, str]()
both = pytest.mark.parametrize("headers", [NAMED, UNNAMED], ids=["named", "recognised"])


class Counting(Talk):
    """Posts to any path, and knows what the last step was asked."""

    async def post(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://router") as http:
            answer = await http.post(path, json={"model": "org/fake"} | body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    @property
    def asked(self) -> StepRequest:
        return self.dispatcher.requests[-1]


@both
@pytest.mark.parametrize("template", [TEMPLATE, DATED], ids=["plain", "dated"])
def test_tokens_are_those_of_the_call(template: str, headers: dict[str, str]) -> None:
    async def main() -> None:
        talk = Counting(text(template), [CALL, "done"])
        path = "/v1/chat/completions"
        body: dict[str, Any] = {"messages": [USER], "tools": [TOOL]}
        told: Message = (await talk.post(path, body, headers))["choices"][0]["message"]
        body["messages"] = [USER, spelled(told), {"role": "tool", "content": "ok", "tool_call_id": "x"}]
        fresh = await talk.post("/tokenize", body, {"x-trace-id": "another"})
        counted = await talk.post("/tokenize", body, headers)
        again = await talk.post("/tokenize", body, headers)
        await talk.post(path, body, headers)
        assert talk.grows
        assert counted["tokens"] == again["tokens"] == unpack_tokens(talk.asked.prompt)
        assert counted["count"] == talk.asked.prompt_tokens != fresh["count"]
        assert len({request.trace for request in talk.dispatcher.requests}) == 1, "counting took nobody's place"

    asyncio.run(main())


@both
def test_messages_are_counted_as_the_call(headers: dict[str, str]) -> None:
    async def main() -> None:
        talk = Counting(text(TEMPLATE), [CALL, "done"])
        tools = [{"name": "write", "input_schema": {"type": "object"}}]
        body: dict[str, Any] = {"messages": [USER], "tools": tools}
        told = await talk.post("/v1/messages", body | {"max_tokens": 999}, headers)
        (call,) = told["content"]
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": "ok"}
        body["messages"] = [
            USER,
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result]},
        ]
        counted = await talk.post("/v1/messages/count_tokens", body, headers)
        fresh = await talk.post("/v1/messages/count_tokens", body, {"x-trace-id": "another"})
        usage = (await talk.post("/v1/messages", body | {"max_tokens": 999}, headers))["usage"]
        assert talk.grows
        assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
        assert counted["input_tokens"] == talk.asked.prompt_tokens != fresh["input_tokens"]

    asyncio.run(main())


@pytest.mark.parametrize("named", [True, False])
def test_responses_are_counted_as_the_call(named: bool) -> None:
    async def main() -> None:
        talk = Counting(text(TEMPLATE), [CALL, "done"])
        tools = [{"type": "function", "name": "write", "parameters": {"type": "object"}}]
        told = await talk.post("/v1/responses", {"input": "go", "tools": tools}, {})
        (call,) = told["output"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "ok"}
        body: dict[str, Any] = {"input": [{"role": "user", "content": "go"}, call, result], "tools": tools}
        if named:
            body |= {"input": [result], "previous_response_id": told["id"]}
        counted = await talk.post("/v1/responses/input_tokens", body, {})
        await talk.post("/v1/responses", body, {})
        assert talk.grows
        assert counted["input_tokens"] == talk.asked.prompt_tokens

    asyncio.run(main())


def test_what_a_call_mends_and_leaves_out_is_not_counted() -> None:
    system = "x-anthropic-billing-header: cc_version=2.1; cch=1;\nBe brief."
    mended = "halves of surrogate pairs were read as U+FFFD"

    async def use(client: httpx.AsyncClient) -> None:
        for path in ("/tokenize", "/v1/messages/count_tokens", "/v1/responses/input_tokens"):
            name = "input" if path.startswith("/v1/responses") else "messages"
            told: list[Any] = []
            for rules, said in ((system, r"\ud83d"), ("Be brief.", r"\ufffd")):
                body = f'{{"model":"org/fake","{name}":[{{"role":"system","content":{json.dumps(rules)}}},' + (
                    f'{{"role":"user","content":"hi {said}"}}]}}'
                )
                answer = await client.post(path, content=body.encode())
                assert answer.status_code == 200, answer.text
                told.append(answer)
            assert told[0].json() == told[1].json()
            warnings = told[0].headers.get_list("x-tracehaul-warning")
            assert warnings == [mended, "x-anthropic-billing-header was left out"]
            assert "x-tracehaul-warning" not in told[1].headers

    served(FakeDispatcher(say("x")), use, text=FakeText())


def test_a_tenant_counts_in_its_own_traces() -> None:
    async def main() -> None:
        talk = Counting(text(TEMPLATE), [CALL, "done"])
        body: dict[str, Any] = {"messages": [USER], "tools": [TOOL], "cache_salt": "one"}
        told = (await talk.post("/v1/chat/completions", body, NAMED))["choices"][0]["message"]
        body["messages"] = [USER, spelled(told), USER]
        own = await talk.post("/tokenize", body, NAMED)
        other = await talk.post("/tokenize", body | {"cache_salt": "two"}, NAMED)
        await talk.post("/v1/chat/completions", body, NAMED)
        assert own["count"] == talk.asked.prompt_tokens != other["count"]

    asyncio.run(main())


PAGES = {
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
    "/v1/messages/count_tokens": {"model": "org/fake", "messages": [USER]},
    "/v1/responses/input_tokens": {"model": "org/fake", "input": "x"},
}


@pytest.mark.parametrize("path", PAGES)
def test_counting_is_limited_as_calls_are(path: str) -> None:
    sent, key = key_of("a", 1, requests_per_minute=2, tokens_per_minute=10)
    busy, slow = key_of("b", 2, concurrency=1)

    async def use(client: httpx.AsyncClient) -> None:
        for left, status in ((1, 200), (0, 200), (0, 429)):
            answer = await client.post(path, json=PAGES[path], headers={"x-api-key": sent})
            assert answer.status_code == status
            assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
            assert answer.headers["x-ratelimit-remaining-tokens"] == "10", "nothing is computed"
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert ("request_id" in answer.json()) == path.startswith("/v1/messages/")
        for _ in range(3):  # one after the other, and after a failure
            wrong = await client.post(path, json={"model": 1}, headers={"x-api-key": busy})
            assert wrong.status_code == 400
            assert (await client.post(path, json=PAGES[path], headers={"x-api-key": busy})).status_code == 200
        call = {"model": "org/fake", "messages": [USER]}
        running = asyncio.create_task(client.post("/v1/chat/completions", json=call, headers={"x-api-key": busy}))
        await asyncio.sleep(0.02)
        assert (await client.post(path, json=PAGES[path], headers={"x-api-key": busy})).status_code == 429
        assert (await running).status_code == 200

    served(FakeDispatcher(say("x", delay_s=0.1)), use, keyring=Keyring([key, slow]))
