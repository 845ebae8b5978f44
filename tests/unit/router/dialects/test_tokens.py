"""Texts and conversations in tokens, and what is not served here."""

from typing import Any

import httpx
import pytest

from router.calls.fakes import FakeDispatcher, FakeText, say
from router.http.keys import Keyring
from tests.unit.router.dialects.asking import NotedText, key_of, post, served

CONVERSATION = {"messages": [{"role": "user", "content": "the abc"}]}
PROMPT = "<|im_start|>user\nthe abc<|im_end|>\n"


class Framed(FakeText):
    """Wants a token before a plain prompt."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        return ([0] if special else []) + super().encode(text, special)


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"prompt": "the abc"}, [0, *FakeText().encode("the abc")]),
        ({"prompt": "the abc", "add_special_tokens": False}, FakeText().encode("the abc")),
        ({"prompt": "", "add_special_tokens": False}, []),
        (CONVERSATION, FakeText().encode(PROMPT + "<|im_start|>assistant\n")),
        (CONVERSATION | {"add_generation_prompt": False}, FakeText().encode(PROMPT)),
        (CONVERSATION | {"model": "org/fake", "unknown": 1}, FakeText().encode(PROMPT + "<|im_start|>assistant\n")),
    ],
)
def test_what_is_tokenized_comes_back(fields: dict[str, Any], ids: list[int]) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        answer = await client.post("/tokenize", json=fields)
        assert answer.json() == {"count": len(ids), "max_model_len": 4096, "tokens": ids, "token_strs": None}
        back = await client.post("/detokenize", json={"tokens": ids})
        assert back.json() == {"prompt": b"".join(map(FakeText().token_bytes, ids)).decode()}

    served(FakeDispatcher(say("x")), use, text=Framed())


def test_tokens_are_told_as_strings() -> None:
    (answer,) = post(FakeDispatcher(say("x")), "/tokenize", {"prompt": "the abc", "return_token_strs": True})
    assert answer.json()["token_strs"] == ["the", " ", "abc"]


def test_tools_and_variables_are_the_templates() -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    text = NotedText()
    fields = CONVERSATION | {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    (answer,) = post(FakeDispatcher(say("x")), "/tokenize", fields, text=text)
    assert answer.json()["tokens"][: len("?tools\n1")] == FakeText().encode("<|im_start|>tools\n1")
    assert text.variables == [{"enable_thinking": False}]


def test_a_long_conversation_is_counted_whole() -> None:
    messages = [{"role": "user", "content": "x" * 9000}]
    (answer,) = post(FakeDispatcher(say("x")), "/tokenize", {"messages": messages})
    assert answer.json()["count"] > 9000


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x"} | CONVERSATION, 400, "prompt"),
        ("/tokenize", {"prompt": 1}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": "yes"}, 400, "add_special_tokens"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [1, 264]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
)
def test_what_is_wrong_is_refused_by_name(path: str, fields: dict[str, Any], status: int, param: str) -> None:
    (answer,) = post(FakeDispatcher(say("x")), path, fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_a_key_tokenizes_for_its_models_only() -> None:
    sent, key = key_of("a", 1, models=("other",))

    async def use(client: httpx.AsyncClient) -> None:
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
            assert (await client.post(path, json=body)).status_code == 401
            assert (await client.post(path, json=body, headers={"x-api-key": sent})).status_code == 403

    served(FakeDispatcher(say("x")), use, keyring=Keyring([key]))


def test_the_window_is_told_once_there_is_one() -> None:
    dispatcher = FakeDispatcher(say("x"))
    dispatcher.card = None
    (answer,) = post(dispatcher, "/tokenize", {"prompt": "x"})
    assert answer.status_code == 503


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/audio/speech", "/v1/audio/transcriptions", "/v1/images/edits"])
def test_what_models_of_text_cannot_is_told_with_what_they_can(path: str) -> None:
    (answer,) = post(FakeDispatcher(say("x")), path, {"model": "org/fake", "input": "x"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (404, "not_served", "invalid_request_error")
    assert path in error["message"]
    assert "/v1/responses" in error["message"]
