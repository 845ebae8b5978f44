"""A plugin of pytest for ``sdk_suites.py``: OpenAI's tests ask for a response by a name that none has. One is made for
each of them, and its name put into the test."""

import json
import os
import types
import urllib.request

import pytest

NAMES = ("resp_677efb5139a88190b512bc3fef8e535d", "response_id")
CODES = pytest.StashKey[types.CodeType]()


def made(*, background: bool) -> str:
    """The name of a new response; of one that runs in the background it may not have ended."""
    body = {"input": "hi", "max_output_tokens": 16, "background": background}
    request = urllib.request.Request(
        f"{os.environ['TEST_API_BASE_URL']}/responses",
        json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": "Bearer none"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["id"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before each test."""
    assert isinstance(item, pytest.Function)
    code = item.function.__code__
    if set(NAMES).isdisjoint(code.co_consts):
        return
    name = made(background="cancel" in item.name)
    item.stash[CODES] = code
    item.function.__code__ = code.replace(
        co_consts=tuple(name if value in NAMES else value for value in code.co_consts)
    )


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After it: the function is shared with the other clients that it is run with."""
    if isinstance(item, pytest.Function) and CODES in item.stash:
        item.function.__code__ = item.stash[CODES]
