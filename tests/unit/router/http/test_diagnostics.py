"""Why a prompt's beginning was of no use, in the forms of those who ask: compared with an earlier answer."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from msgspec import structs

from router.calls.fakes import FakeDispatcher, Script
from router.dispatch.steps import Finished, Output, StepRequest
from router.http.app import create_app
from router.http.config import ApiConfig
from tests.unit.router.dialects.asking import told as events_of
from tests.unit.router.http.test_verbatim import TEMPLATE, Talk, text
from tracehaul.runtime.offload import InlineOffload

TOOL = {"name": "write", "input_schema": {"type": "object"}}
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"


class Compared(Talk):
    """Posts to any path; ``cached``: half of each prompt is."""

    cached = True

    def _script(self, request: StepRequest) -> Script:
        (told, _) = super()._script(request)
        assert isinstance(told, Output)
        assert told.usage is not None
        usage = structs.replace(told.usage, computed_from=request.prompt_tokens // 2 if self.cached else 0)
        return [structs.replace(told, usage=usage), Finished("stop", usage)]

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://router") as http:
            answer = await http.post(path, json={"model": "org/fake"} | body, headers=self.headers)
        assert answer.status_code == 200, answer.text
        return answer


def talks(trace: str | None) -> Compared:
    return Compared(text(TEMPLATE), [f"answer {at}" for at in range(9)], trace=trace)


def asked(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "go"}, *fields.pop("more", [])]
    return {"max_tokens": 99, "system": "rules", "messages": messages, "tools": [TOOL]} | fields


ADDED = [{"role": "assistant", "content": "answer 0"}, {"role": "user", "content": "on"}]
EDITED = [{"role": "user", "content": "go!"}, *ADDED]


@pytest.mark.parametrize("trace", ["t", None], ids=["named", "by the answer alone"])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"more": ADDED}, None),
        ({"more": ADDED, "system": "other rules"}, "system_changed"),
        ({"more": ADDED, "tools": [TOOL, TOOL | {"name": "read"}]}, "tools_changed"),
        ({"messages": EDITED}, "messages_changed"),
        ({"more": ADDED, "thinking": {"type": "disabled"}}, "unavailable"),
    ],
)
def test_messages_say_what_their_client_changed(trace: str | None, fields: dict[str, Any], reason: str | None) -> None:
    async def main() -> None:
        talk = talks(trace)
        first = (await talk.post(MESSAGES, asked(diagnostics={"previous_message_id": None}))).json()
        assert first["diagnostics"] is None
        body = asked(**fields) | {"diagnostics": {"previous_message_id": first["id"]}}
        told = (await talk.post(MESSAGES, body)).json()["diagnostics"]
        found = None if told is None else told["cache_miss_reason"]
        assert (None if found is None else found["type"]) == reason
        assert found is None or ("cache_missed_input_tokens" in found) == reason.endswith("_changed")
        (start, *_) = events_of((await talk.post(MESSAGES, body | {"stream": True})).text)
        assert "diagnostics" in start["message"]

    asyncio.run(main())


def test_a_stream_of_messages_begins_with_it() -> None:
    async def main() -> None:
        talk = talks("t")
        first = (await talk.post(MESSAGES, asked())).json()
        body = asked(system="other", diagnostics={"previous_message_id": first["id"]}, stream=True)
        (start, *_) = events_of((await talk.post(MESSAGES, body)).text)
        assert start["message"]["diagnostics"]["cache_miss_reason"]["type"] == "system_changed"

    asyncio.run(main())


def test_who_does_not_ask_is_told_nothing() -> None:
    async def main() -> None:
        talk = talks("t")
        await talk.post(MESSAGES, asked())
        assert (await talk.post(MESSAGES, asked(system="other"))).json()["diagnostics"] is None
        told = (await talk.post(RESPONSES, {"input": "x"})).json()
        assert told["prompt_cache_diagnostics"] is None

    asyncio.run(main())


def test_an_answer_that_is_not_known_or_anothers_cannot_be_compared_with() -> None:
    async def main() -> None:
        talk = talks("t")
        first = (await talk.post(MESSAGES, asked())).json()
        for name, headers, kind in (
            ("msg_other", {"x-trace-id": "t"}, "previous_message_not_found"),
            (first["id"], {"x-trace-id": "another"}, "unavailable"),
            (first["id"], {"x-trace-id": "child", "x-parent-trace-id": "t"}, None),
        ):
            talk.headers = headers
            body = asked(more=ADDED, diagnostics={"previous_message_id": name})
            told = (await talk.post(MESSAGES, body)).json()["diagnostics"]
            assert told == (None if kind is None else {"cache_miss_reason": {"type": kind}})
        talk.headers = {"x-trace-id": "t"}
        salted = asked(cache_salt="one", diagnostics={"previous_message_id": first["id"]})
        told = (await talk.post(MESSAGES, salted)).json()["diagnostics"]
        assert told == {"cache_miss_reason": {"type": "previous_message_not_found"}}, "another tenant's"

    asyncio.run(main())


def test_another_model_is_said() -> None:
    model = text(TEMPLATE)

    class Two(FakeDispatcher):
        def model(self, name: str) -> Any:
            assert self.card is not None
            return self.card

    async def main() -> None:
        dispatcher = Two(talks("t")._script)
        app = create_app(dispatcher, {"one": model, "two": model}, lambda: b"", ApiConfig(), InlineOffload())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as http:
            first = (await http.post(MESSAGES, json=asked(model="one"), headers={"x-trace-id": "t"})).json()
            body = asked(model="two", more=ADDED, diagnostics={"previous_message_id": first["id"]})
            told = (await http.post(MESSAGES, json=body, headers={"x-trace-id": "t"})).json()["diagnostics"]
        found = told["cache_miss_reason"]
        assert found["type"] == "model_changed"
        assert found["cache_missed_input_tokens"] > len("rules")

    asyncio.run(main())


FUNCTION = {"type": "function", "name": "write", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"instructions": "other rules"}, "input_changed"),
        ({"input": "go!"}, "input_changed"),
        ({"tools": [FUNCTION, FUNCTION | {"name": "read"}]}, "tools_changed"),
        ({"reasoning": {"effort": "low"}}, "reasoning_effort_changed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_responses_say_what_their_client_changed(fields: dict[str, Any], reason: str | None, stream: bool) -> None:
    async def main() -> None:
        talk = talks(None)
        body: dict[str, Any] = {"input": "go", "instructions": "rules", "tools": [FUNCTION]}
        first = (await talk.post(RESPONSES, body)).json()
        assert first["prompt_cache_diagnostics"] is None
        body |= {"prompt_cache_options": {"comparison_response_id": first["id"], "mode": "implicit"}, "stream": stream}
        answer = await talk.post(RESPONSES, body | fields)
        told = events_of(answer.text)[-1]["response"] if stream else answer.json()
        found = told["prompt_cache_diagnostics"]
        if reason is None:
            assert found == {"type": "cache_hit"}
        else:
            assert (found["type"], found["reason"]) == ("cache_miss", reason)
            assert found["cache_missed_tokens"] >= 0
        async with httpx.AsyncClient(transport=httpx.ASGITransport(talk.app), base_url="http://router") as http:
            kept = (await http.get(f"{RESPONSES}/{told['id']}")).json()
        assert kept["prompt_cache_diagnostics"] == found

    asyncio.run(main())


def test_what_was_not_cached_although_nothing_changed_is_no_hit() -> None:
    async def main() -> None:
        talk = talks(None)
        first = (await talk.post(RESPONSES, {"input": "go"})).json()
        talk.cached = False
        options = {"comparison_response_id": first["id"]}
        told = (await talk.post(RESPONSES, {"input": "go", "prompt_cache_options": options})).json()
        assert told["prompt_cache_diagnostics"] == {"type": "unavailable"}

    asyncio.run(main())


def test_a_response_that_is_not_known_cannot_be_compared_with() -> None:
    async def main() -> None:
        talk = talks(None)
        options = {"comparison_response_id": "resp_other"}
        told = (await talk.post(RESPONSES, {"input": "go", "prompt_cache_options": options})).json()
        assert json.dumps(told["prompt_cache_diagnostics"]) == '{"type": "comparison_response_not_found"}'

    asyncio.run(main())
