"""What agents send that is long, deep, many or twice."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from router.calls.fakes import FakeDispatcher, say
from tests.unit.router.dialects.asking import served
from tests.unit.router.tool_calls import WEATHER, Told, ask, asked, function, hermes, matching, prompt, streamed, whole

CHAT = "/v1/chat/completions"


def test_a_conversation_of_many_messages_goes_on() -> None:
    turns = [({"role": "user", "content": f"q{at}"}, {"role": "assistant", "content": f"a{at}"}) for at in range(250)]
    messages = [message for turn in turns for message in turn] + [{"role": "user", "content": "last"}]
    assert len(messages) == 501
    shown = prompt(messages=messages)
    places = [shown.find(json.dumps(message["content"])) for message in messages]
    assert places == sorted(places)
    assert -1 not in places


DEEP = '{"a":' * 3000 + "1" + "}" * 3000


def test_deep_arguments_of_a_history_are_told() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": DEEP}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ]
    answer, dispatcher = ask("x", messages=messages, tools=[WEATHER])
    assert answer.status_code == 200, answer.text
    assert len(dispatcher.requests) == 1


@pytest.mark.parametrize("told", [whole, streamed])
def test_deep_arguments_of_an_answer_are_told(told: Told) -> None:
    choice = told(f'<tool_call>{{"name": "weather", "arguments": {DEEP}}}</tool_call>', tools=[WEATHER])
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": DEEP}
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("count", "characters", "fields"),
    [
        (40, 1900, {"tool_choice": "required"}),
        (200, 0, {"tool_choice": "required"}),
        (128, 600, {"response_format": {"type": "json_object"}}),
    ],
)
def test_an_answer_is_held_to_many_tools(count: int, characters: int, fields: dict[str, Any]) -> None:
    tools = [function(f"tool_{at}", description="d" * characters) for at in range(count)]
    last = f"tool_{count - 1}"
    calls = hermes(last, {"place": "a"}), hermes(last, {"place": 1}), hermes("nobody", {"place": "a"})
    assert matching(asked(tools=tools, **fields), *calls) == [True, False, False]


def test_as_many_tools_as_there_may_be_are_told() -> None:
    answer, dispatcher = ask("x", tools=[function(f"tool_{at}", description="d" * 2000) for at in range(512)])
    assert answer.status_code == 200, answer.text
    assert dispatcher.requests[0].sampling.constraint is None


def test_a_call_that_is_sent_again_with_its_ids_is_answered_again() -> None:
    """While the first still runs, and after it."""
    dispatcher = FakeDispatcher(say("yes", delay_s=0.01))
    headers = {"x-request-id": "r", "x-trace-id": "t"}
    body = {"model": "org/fake", "messages": [{"role": "user", "content": "hi"}], "seed": 1}
    answers: list[httpx.Response] = []

    async def use(client: httpx.AsyncClient) -> None:
        posts = [client.post(CHAT, json=body, headers=headers) for _ in range(2)]
        answers.extend(await asyncio.gather(*posts))
        answers.append(await client.post(CHAT, json=body, headers=headers))

    served(dispatcher, use)
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == ["yes"] * 3
    assert {answer.headers["x-request-id"] for answer in answers} == {"r"}
    assert len({request.step for request in dispatcher.requests}) == 3
    assert {request.sampling.seed for request in dispatcher.requests} == {1}
    assert len({request.prompt for request in dispatcher.requests}) == 1


@pytest.mark.parametrize("coding", ["br", "zstd"])
def test_a_body_that_nobody_here_unpacks_is_refused_unread(coding: str) -> None:
    dispatcher = FakeDispatcher(say("x"))

    async def use(client: httpx.AsyncClient) -> None:
        body = {"model": "org/fake", "messages": [{"role": "user", "content": "hi"}]}
        answer = await client.post(CHAT, json=body, headers={"content-encoding": coding})
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_content_encoding")
        assert not dispatcher.requests

    served(dispatcher, use)
