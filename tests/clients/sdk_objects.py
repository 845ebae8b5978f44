"""A plugin of pytest for ``sdk_suites.py``: OpenAI's tests ask for what is kept by names that nothing has. What they
name is made for each of them, and its name put into the test."""

import json
import os
import types
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

CODES = pytest.StashKey[types.CodeType]()
MODEL = "gpt-6-astra"
FORM = "form"


def post(path: str, body: bytes, kind: str = "application/json") -> str:
    """The id of what is made by that."""
    headers = {"content-type": kind, "authorization": "Bearer none"}
    request = urllib.request.Request(f"{os.environ['TEST_API_BASE_URL']}{path}", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["id"]


def made(path: str, **body: Any) -> str:
    """The same, of a body in JSON."""
    return post(path, json.dumps(body).encode())


def response(test: str) -> str:
    """A response; one that is to be cancelled, or streamed later, runs in the background, and may not have ended."""
    background = "cancel" in test or ("retrieve" in test and "overload_2" in test)
    return made("/responses", input="hi", max_output_tokens=16, background=background)


def completion(test: str) -> str:
    """A chat completion that is kept; their type of the messages that it answers knows the assistant's alone."""
    asked = [{"role": "assistant", "content": "hi"}]
    return made("/chat/completions", messages=asked, max_completion_tokens=8, store=True, metadata={"foo": "string"})


def file(test: str) -> str:
    """A file that a batch can be made of."""
    line = {"custom_id": "1", "method": "POST", "url": "/v1/responses", "body": {"model": MODEL, "input": "hi"}}
    line["body"]["max_output_tokens"] = 8
    parts = (
        f'--{FORM}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n',
        f'--{FORM}\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n',
        f"{json.dumps(line)}\n\r\n--{FORM}--\r\n",
    )
    return post("/files", "".join(parts).encode(), f"multipart/form-data; boundary={FORM}")


def batch(test: str) -> str:
    """A batch."""
    return made("/batches", completion_window="24h", endpoint="/v1/responses", input_file_id=file(test))


MAKERS: dict[str, Callable[[str], str]] = {
    "resp_677efb5139a88190b512bc3fef8e535d": response,
    "response_id": response,
    "completion_id": completion,
    "file_id": file,
    "input_file_id": file,
    "batch_id": batch,
}
"""By what tests say."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before each test, but those that ask a server of their own."""
    assert isinstance(item, pytest.Function)
    if "respx2_mock" in item.fixturenames:
        return
    code = item.function.__code__
    named = [value for value in code.co_consts if isinstance(value, str) and value in MAKERS]
    if not named:
        return
    names = {value: MAKERS[value](item.name) for value in named}
    item.stash[CODES] = code
    item.function.__code__ = code.replace(
        co_consts=tuple(names.get(value, value) if isinstance(value, str) else value for value in code.co_consts)
    )


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After it: the function is shared with the other clients that it is run with."""
    if isinstance(item, pytest.Function) and CODES in item.stash:
        item.function.__code__ = item.stash[CODES]
