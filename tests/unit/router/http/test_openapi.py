"""What the API says of itself is what it does."""

import asyncio
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.files import FileLimits
from jobs.folder.files import FolderFiles
from records.fakes import MemoryDocuments
from router.calls.fakes import FakeDispatcher, FakeText, say
from router.dialects.openai.requests import INTEGER_MAX, LIMITS, NO_OPS
from router.http.app import NOT_SERVED, create_app
from router.http.chats import Chats, ChatStats
from router.http.config import ApiConfig
from router.http.jobs import Jobs
from router.http.keys import Key, Keyring, hashed
from router.http.openapi import OPERATIONS
from tests.folder_jobs import folder_batches
from tracehaul.runtime.offload import InlineOffload

SECRET = f"th-0123abcd-{'s' * 43}"
SAID = {"messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, Any] = {
    "/v1/chat/completions": SAID,
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": SAID | {"max_tokens": 10},
    "/v1/responses/input_tokens": {"input": "hi"},
    "/v1/messages/count_tokens": SAID,
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104]},
    "/v1/chat/completions/{id}": {"metadata": {}},
    "/v1/traces/{id}/suspend": {"expected_s": 1},
    "/v1/traces/{id}/pin": {},
    "/v1/traces/{id}/resume": {},
    "/cluster/{id}/role": {"role": "prefill"},
}


def answers(*requests: tuple[str, str, Any], keyed: bool = False, **headers: str) -> list[httpx.Response]:
    keyring = Keyring([Key("0123abcd", hashed(SECRET), requests_per_minute=100)]) if keyed else None

    async def main(folder: str) -> list[httpx.Response]:
        offload = InlineOffload()
        files = FolderFiles(Path(folder) / "files", FileLimits(), offload)
        jobs = Jobs(files, folder_batches(Path(folder) / "batches", files, offload, 10))
        app = create_app(
            FakeDispatcher(say("hi")),
            {"org/fake": FakeText()},
            lambda: b"steps 1\n",
            ApiConfig(body_bytes_max=10_000),
            offload,
            keyring=keyring,
            jobs=jobs,
            chats=Chats(MemoryDocuments(), ApiConfig(), ChatStats()),
        )
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client, asyncio.timeout(20):
            told: list[httpx.Response] = []
            for method, path, body in requests:
                sent = {"content": body} if isinstance(body, bytes) else {"json": body}
                told.append(await client.request(method, path, **sent, headers=headers))
            return told

    with TemporaryDirectory() as folder:
        return asyncio.run(main(folder))


def document(*, keyed: bool = False) -> dict[str, Any]:
    return answers(("GET", "/openapi.json", None), keyed=keyed)[0].json()


def check(described: dict[str, Any], method: str, path: str, answer: httpx.Response) -> None:
    """That this answer is among those that are described."""
    told = described["paths"][path][method.lower()]["responses"]
    assert str(answer.status_code) in told, (method, path, answer.status_code, answer.text)
    kind = answer.headers["content-type"].partition(";")[0]
    content = told[str(answer.status_code)]["content"]
    assert kind in content, (path, kind)
    if kind == "application/json":
        schema = {"components": described["components"], **content[kind]["schema"]}
        jsonschema.Draft202012Validator(schema).validate(answer.json())


def test_every_path_is_described() -> None:
    described = document()
    never = {re.sub(r":path", "", path) for path in NOT_SERVED}
    there = {(m.upper(), path) for path, methods in described["paths"].items() for m in methods if path not in never}
    assert there == set(OPERATIONS)
    for path in never:
        for each in described["paths"][path].values():
            assert "200" not in each["responses"]
            assert "404" in each["responses"]
    names = [each["operationId"] for methods in described["paths"].values() for each in methods.values()]
    assert len(set(names)) == len(names)


def test_what_is_answered_is_what_is_described() -> None:
    described = document()
    asked: list[tuple[str, str, str, Any]] = []
    for method, path in OPERATIONS:
        body = BODIES.get(path)
        if body is not None and "{" not in path and path != "/detokenize":
            body = body | {"model": "org/fake"}
        at = path.replace("{name}", "org/fake").replace("{id}", "unknown")
        asked.append((method, path, at, body))
        if method == "POST":
            asked += [(method, path, at, wrong) for wrong in (b"", b"[]", b"{", b'{"model": 1}', b"x" * 20_000)]
            asked.append((method, path, at, (body or {}) | {"model": "other"}))
            if OPERATIONS[method, path].streams:
                asked.append((method, path, at, body | {"stream": True}))
    asked = [each for each in asked if each[0] == "GET"] + [each for each in asked if each[0] != "GET"]
    for (method, path, _, _), answer in zip(
        asked, answers(*((method, at, body) for method, _, at, body in asked)), strict=True
    ):
        check(described, method, path, answer)
    good = [
        (method, at, body)
        for method, path, at, body in asked
        if body is not None and not isinstance(body, bytes) and body.get("model") == "org/fake"
    ]
    assert len(good) >= 10
    assert [a.status_code for a in answers(*good)] == [200] * len(good)


@pytest.mark.parametrize("headers", [{}, {"x-api-key": SECRET}, {"content-encoding": "br", "x-api-key": SECRET}])
def test_with_keys_the_document_says_so(headers: dict[str, str]) -> None:
    described = document(keyed=True)
    assert set(described["components"]["securitySchemes"]) == {"bearer", "header"}
    for method, path in OPERATIONS:
        at = path.replace("{name}", "org/fake").replace("{id}", "unknown")
        (answer,) = answers((method, at, BODIES.get(path)), keyed=True, **headers)
        check(described, method, path, answer)
        assert ("security" in described["paths"][path][method.lower()]) == (
            path not in ("/health", "/version", "/openapi.json")
        )


def test_the_document_is_openapi() -> None:
    described = document()
    text = msgspec.json.encode(described).decode()
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert names <= set(described["components"]["schemas"])
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in described["components"]["schemas"])
    assert described["openapi"].startswith("3.1")
    chat = described["paths"]["/v1/chat/completions"]["post"]
    assert "text/event-stream" in chat["responses"]["200"]["content"]
    assert "429" not in chat["responses"], "without keys nobody is limited"


def test_fingerprints_name_files_and_build() -> None:
    from tracehaul import __version__

    chat, text, stream = answers(
        ("POST", "/v1/chat/completions", SAID | {"model": "org/fake"}),
        ("POST", "/v1/completions", {"prompt": "hi", "model": "org/fake"}),
        ("POST", "/v1/chat/completions", SAID | {"model": "org/fake", "stream": True}),
    )
    expected = f"fp_fake_{__version__}"
    assert chat.json()["system_fingerprint"] == text.json()["system_fingerprint"] == expected
    chunks = [msgspec.json.decode(line[6:]) for line in stream.content.split(b"\n\n") if line.startswith(b"data: {")]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {expected}


def test_a_method_that_a_path_has_not_is_answered_with_those_that_it_has() -> None:
    described = document()
    for path, methods in described["paths"].items():
        at = re.sub(r"\{\w+\}", "x", path)
        (answer,) = answers(("PATCH", at, None))
        allowed = set(answer.headers["allow"].split(", "))
        assert answer.status_code == 405
        assert allowed - {"HEAD"} == {method.upper() for method in methods}, path


@pytest.mark.parametrize("name", sorted(LIMITS.keys() - {"max_completion_tokens", "max_output_tokens", "top_logprobs"}))
def test_numbers_have_the_limits_that_are_told(name: str) -> None:
    low, high = LIMITS[name]
    told = document()["components"]["schemas"]["CompletionRequest"]["properties"][name]
    numbers = next(each for each in told["anyOf"] if each.get("type") in ("integer", "number", "object"))
    numbers = numbers.get("additionalProperties", numbers)
    assert (numbers["minimum"], numbers["maximum"]) == (low, high)
    step = 1 if isinstance(low, int) else 0.1
    base = {"model": "org/fake", "prompt": "hi", "echo": name == "max_tokens", "max_tokens": INTEGER_MAX}
    lowest, highest, under, over = answers(
        *(
            ("POST", "/v1/completions", base | {name: {"5": value} if name == "logit_bias" else value})
            for value in (low, high, low - step, high + step)
        )
    )
    assert lowest.status_code == 200, lowest.text
    if name != "n":  # of choices a call may have fewer
        assert highest.status_code == 200, highest.text
    for answer in (under, over):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value"), answer.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_what_cannot_be_honoured_is_told(path: str) -> None:
    described = document()
    told = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    properties = described["components"]["schemas"][told.rpartition("/")[2]]["properties"]
    body = {"model": "org/fake"} | BODIES[path]
    for name in NO_OPS.keys() & properties.keys():
        told = properties[name]["enum"]
        assert [a.status_code for a in answers(*(("POST", path, body | {name: value}) for value in told))] == [
            200
        ] * len(told), name


def test_what_no_response_says_of_its_caller_is_left_out() -> None:
    """OpenAI's own description has no null there."""
    said = {"user": "u", "safety_identifier": "", "prompt_cache_key": "k"}
    asked = {"model": "org/fake", "input": "hi"}
    plain, full = answers(("POST", "/v1/responses", asked), ("POST", "/v1/responses", asked | said))
    assert not said.keys() & plain.json().keys()
    assert {name: full.json()[name] for name in said} == said


LEAF = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
WORDS = st.sampled_from(
    ["type", "text", "name", "id", "role", "content", "function", "arguments", "input", "output", "schema", "$ref"]
)
JSON = st.recursive(
    LEAF | st.sampled_from(["function", "custom", "user", "text", "object", "json_schema", "fake", "#/$defs/a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def fields(described: dict[str, Any], path: str) -> list[str]:
    """Those that the document knows of that path's body."""
    told = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return sorted(described["components"]["schemas"][told["$ref"].rpartition("/")[2]].get("properties", {})) or ["x"]


@pytest.mark.parametrize("path", list(BODIES))
def test_any_body_is_answered_as_described(path: str) -> None:
    described = document()
    texts, store = {"org/fake": FakeText()}, Chats(MemoryDocuments(), ApiConfig(), ChatStats())
    app = create_app(FakeDispatcher(say("hi")), texts, lambda: b"", ApiConfig(), InlineOffload(), chats=store)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    at = path.replace("{id}", "unknown")
    body = BODIES[path] if at != path else BODIES[path] | {"model": "org/fake"}
    statuses: set[int] = set()

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(fields(described, path)), JSON, max_size=3))
    def every(changed: dict[str, Any]) -> None:
        async def main() -> httpx.Response:
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client, asyncio.timeout(20):
                return await client.post(at, json=body | changed)

        answer = asyncio.run(main())
        assert answer.status_code < 500, answer.text
        check(described, "POST", path, answer)
        statuses.add(answer.status_code)

    every()
    assert len(statuses) >= 2, "some of them are refused, and some are not"
