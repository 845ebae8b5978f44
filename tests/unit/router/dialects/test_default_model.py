"""A call that names no model gets the first that is served; one that names another gets it, or is refused."""

import asyncio
from typing import Any

import httpx
import pytest

from router.calls.fakes import FakeDispatcher, FakeText, say
from router.dispatch.steps import ModelCard
from router.http.app import create_app
from router.http.config import ApiConfig
from router.http.keys import Keyring
from tests.unit.router.dialects.asking import key_of
from tracehaul.runtime.offload import InlineOffload

SAID = {"messages": [{"role": "user", "content": "hi"}]}
CALLS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": SAID,
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": SAID | {"max_tokens": 10},
}
COUNTED: dict[str, tuple[str, dict[str, Any]]] = {
    "/tokenize": ("count", {"prompt": "hi"}),
    "/v1/responses/input_tokens": ("input_tokens", {"input": "hi"}),
    "/v1/messages/count_tokens": ("input_tokens", SAID),
}
SHORT, LONG = "org/short", "org/long"
CARDS = {SHORT: ModelCard(SHORT, 4096, pool="short"), LONG: ModelCard(LONG, 4096, pool="long")}
ORDERS = ((SHORT, LONG), (LONG, SHORT))
UNNAMED: tuple[dict[str, Any], ...] = ({}, {"model": None}, {"model": ""})


class Doubled(FakeText):
    """Has two tokens for each of the other's."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        return [token for each in super().encode(text, special) for token in (each, each)]

    def token_bytes(self, token: int) -> bytes:
        return super().token_bytes(token) * 2


class Two(FakeDispatcher):
    """Serves two models."""

    def model(self, name: str) -> ModelCard | None:
        return CARDS.get(name)


def asked(order: tuple[str, str], path: str, *bodies: Any, **headers: str) -> tuple[list[httpx.Response], list[str]]:
    """The answers of a cluster whose models are in this order, and the pools of the steps that ran."""
    dispatcher = Two(say("yes"))
    texts = {name: FakeText() if name == SHORT else Doubled() for name in order}
    _, key = key_of("a", 1, models=(LONG,))
    keyring = Keyring([key]) if headers else None

    async def main() -> list[httpx.Response]:
        app = create_app(dispatcher, texts, lambda: b"", ApiConfig(), InlineOffload(), keyring=keyring)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client, asyncio.timeout(20):
            return [await client.post(path, json=body, headers=headers) for body in bodies]

    return asyncio.run(main()), [request.pool for request in dispatcher.requests]


@pytest.mark.parametrize("first", [SHORT, LONG])
@pytest.mark.parametrize("path", CALLS)
def test_a_call_runs_on_the_first(path: str, first: str) -> None:
    second = LONG if first == SHORT else SHORT
    bodies = [CALLS[path] | fields for fields in (*UNNAMED, {"model": second})]
    answers, pools = asked((first, second), path, *bodies)
    assert [(answer.status_code, answer.json()["model"]) for answer in answers] == [*[(200, first)] * 3, (200, second)]
    assert pools == [CARDS[first].pool] * 3 + [CARDS[second].pool]


@pytest.mark.parametrize("path", COUNTED)
def test_a_prompt_is_counted_as_the_first_reads_it(path: str) -> None:
    field, body = COUNTED[path]
    bodies = [body | fields for fields in (*UNNAMED, {"model": LONG})]
    short, long = ([answer.json()[field] for answer in asked(order, path, *bodies)[0]] for order in ORDERS)
    few, many = short[0], long[0]
    assert many > few > 0
    assert short == [few, few, few, many]
    assert long == [many] * 4


def test_tokens_are_those_of_the_first() -> None:
    bodies = [{"tokens": [104]} | fields for fields in (*UNNAMED, {"model": LONG})]
    short, long = ([answer.json()["prompt"] for answer in asked(order, "/detokenize", *bodies)[0]] for order in ORDERS)
    assert (short, long) == (["h", "h", "h", "hh"], ["hh"] * 4)


@pytest.mark.parametrize("path", [*CALLS, *COUNTED, "/detokenize"])
def test_an_unknown_one_is_not_the_first(path: str) -> None:
    body = CALLS.get(path) or COUNTED.get(path, ("", {"tokens": [104]}))[1]
    answers, pools = asked(ORDERS[0], path, body | {"model": "other"}, body | {"model": "short"})
    assert [answer.status_code for answer in answers] == [404, 404]
    assert pools == []


@pytest.mark.parametrize("path", [*CALLS, *COUNTED, "/detokenize"])
def test_a_key_that_may_not_use_the_first_is_told_so(path: str) -> None:
    sent, _ = key_of("a", 1)
    body = CALLS.get(path) or COUNTED.get(path, ("", {"tokens": [104]}))[1]
    for order, status in ((ORDERS[0], 403), (ORDERS[1], 200)):
        (answer,), _ = asked(order, path, body, **{"x-api-key": sent})
        assert answer.status_code == status
