"""Who asks, and what they may: over HTTP, in process."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from router.calls.fakes import FakeDispatcher, FakeText, say
from router.dispatch.steps import ModelCard
from router.http.app import create_app
from router.http.config import ApiConfig
from router.http.keys import BadKeys, Key, KeyFile, Keyring, hashed, read_keys, write_keys
from sim.lifespan import living
from tracehaul.runtime.offload import InlineOffload

CHAT = "/v1/chat/completions"


def secret(name: str) -> str:
    return f"th-{name}-{'s' * 43}"


ACME, BETA, BOSS, LEAD = "aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd"


def key(name: str, **fields: Any) -> Key:
    return Key(name, hashed(secret(name)), **fields)


KEYS = (
    key(ACME, tenant="acme", models=("org/fake",)),
    key(BETA, tenant="beta"),
    key(BOSS, steer=True),
    key(LEAD, tenant="acme", steer=True),
)

Send = Callable[..., Awaitable[httpx.Response]]


def served(
    use: Callable[[Send], Awaitable[None]],
    keys: Sequence[Key] | None = KEYS,
    dispatcher: FakeDispatcher | None = None,
    config: ApiConfig | None = None,
) -> FakeDispatcher:
    """Runs ``use`` with what sends a request by a key's name."""
    dispatcher = dispatcher or FakeDispatcher(say("hi"))

    async def main() -> None:
        keyring = None if keys is None else Keyring(keys)
        app = create_app(
            dispatcher,
            {"org/fake": FakeText()},
            lambda: b"steps 1\n",
            config or ApiConfig(),
            InlineOffload(),
            keyring=keyring,
        )
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        client_of = httpx.AsyncClient(transport=transport, base_url="http://test")
        async with asyncio.timeout(20), living(app), client_of as client:

            async def send(
                name: str | None, method: str, path: str, body: Any = None, **headers: str
            ) -> httpx.Response:
                sent = {header.replace("_", "-"): value for header, value in headers.items()}
                if name is not None:
                    sent["authorization"] = f"Bearer {secret(name)}"
                return await client.request(method, path, json=body, headers=sent)

            await use(send)

    asyncio.run(main())
    return dispatcher


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "org/fake", "messages": [{"role": "user", "content": "hello"}], **fields}


def error(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["code"]


def test_without_a_valid_key_nothing_but_the_public_pages() -> None:
    wrong = (None, "eeeeeeee")

    async def use(send: Send) -> None:
        for name in wrong:
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/cluster"), ("GET", "/metrics")):
                answer = await send(name, method, path, chat() if method == "POST" else None)
                assert error(answer) == (401, "invalid_api_key")
                assert answer.json()["error"]["type"] == "invalid_request_error"
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.headers["x-request-id"]
            assert error(await send(name, "GET", "/nowhere")) == (401, "invalid_api_key")
            assert (await send(name, "GET", "/health")).status_code == 200
            assert (await send(name, "GET", "/version")).json()["version"]
        almost = secret(ACME)[:-1] + "t"
        assert (await send(None, "POST", CHAT, chat(), authorization=f"Bearer {almost}")).status_code == 401
        assert (await send(None, "POST", CHAT, chat(), authorization=f"Basic {secret(ACME)}")).status_code == 401

    assert served(use).requests == []


def test_both_ways_to_send_a_key() -> None:
    async def use(send: Send) -> None:
        assert (await send(None, "POST", CHAT, chat(), x_api_key=secret(ACME))).status_code == 200
        assert (await send(None, "POST", CHAT, chat(), authorization=f"bearer {secret(ACME)}")).status_code == 200
        assert (await send(ACME, "POST", CHAT, chat())).status_code == 200

    served(use)


def test_without_keys_everybody_may_everything() -> None:
    async def use(send: Send) -> None:
        for path in ("/cluster", "/metrics", "/v1/models"):
            assert (await send(None, "GET", path)).status_code == 200
        answer = await send(None, "POST", CHAT, chat(cache_salt="acme"), x_decode_worker="decode-0")
        assert answer.status_code == 200
        assert "x-ratelimit-limit-requests" not in answer.headers

    made = served(use, keys=None).requests[-1]
    assert (made.salt, made.tenant, made.decode) == ("acme", "acme", "decode-0")


def test_models_of_a_key() -> None:
    other = FakeDispatcher(say("hi"))
    other.card = ModelCard("org/other", 100)

    async def use(send: Send) -> None:
        assert error(await send(ACME, "POST", CHAT, chat(model="org/other"))) == (403, "model_not_allowed")
        assert error(await send(BETA, "POST", CHAT, chat(model="org/other"))) == (404, "model_not_found")
        assert (await send(ACME, "GET", "/v1/models")).json()["data"] == []
        assert (await send(ACME, "GET", "/v1/models/org/other")).status_code == 404
        assert [m["id"] for m in (await send(BETA, "GET", "/v1/models")).json()["data"]] == ["org/other"]

    assert served(use, dispatcher=other).requests == []


def test_steering_is_for_those_who_may() -> None:
    async def use(send: Send) -> None:
        for path in ("/cluster", "/metrics"):
            assert error(await send(ACME, "GET", path)) == (403, "steering_not_allowed")
            assert (await send(BOSS, "GET", path)).status_code == 200
        refused = await send(ACME, "POST", CHAT, chat(), x_decode_worker="decode-0")
        assert error(refused) == (403, "steering_not_allowed")
        refused = await send(ACME, "POST", CHAT, chat(cache_salt="more"))
        assert (*error(refused), refused.json()["error"]["param"]) == (403, "steering_not_allowed", "cache_salt")
        assert error(await send(ACME, "POST", CHAT, chat(cache_salt="beta"))) == (403, "steering_not_allowed")
        assert (await send(ACME, "POST", CHAT, chat(cache_salt="acme"))).status_code == 200  # it is
        assert (await send(LEAD, "POST", CHAT, chat(cache_salt="beta"), x_decode_worker="decode-1")).status_code == 200
        assert (await send(BOSS, "POST", CHAT, chat(cache_salt="beta"))).status_code == 200
        assert (await send(BOSS, "POST", CHAT, chat())).status_code == 200

    made = [(each.salt, each.tenant, each.decode) for each in served(use).requests]
    assert made == [
        ("acme", "acme", None),
        ("acme/beta", "acme", "decode-1"),
        ("beta", "beta", None),
        ("", "", None),
    ]


def test_tenants_know_nothing_of_each_other() -> None:
    async def use(send: Send) -> None:
        await send(ACME, "POST", CHAT, chat(), x_trace_id="mine")
        for name in (BETA, LEAD):
            listed = (await send(name, "GET", "/v1/traces")).json()["data"]
            assert [trace["id"] for trace in listed] == ([] if name == BETA else ["mine"])
        for method, path, body in (
            ("GET", "/v1/traces/mine", None),
            ("DELETE", "/v1/traces/mine", None),
            ("POST", "/v1/traces/mine/suspend", {"expected_s": 1}),
            ("POST", "/v1/traces/mine/resume", {}),
        ):
            assert error(await send(BETA, method, path, body)) == (404, "trace_not_found")
            assert error(await send(BETA, method, f"{path}?cache_salt=acme", body)) == (403, "steering_not_allowed")
        assert error(await send(BETA, "POST", "/v1/traces/mine/pin", {})) == (403, "steering_not_allowed")
        assert error(await send(BOSS, "POST", "/v1/traces/mine/pin", {})) == (404, "trace_not_found")
        assert (await send(LEAD, "POST", "/v1/traces/mine/pin", {})).status_code == 200
        assert (await send(BOSS, "GET", "/v1/traces/mine?cache_salt=acme")).status_code == 200
        # The same name is another trace.
        await send(BETA, "POST", CHAT, chat(), x_trace_id="mine")
        assert error(await send(BETA, "DELETE", "/v1/traces?cache_salt=acme")) == (403, "steering_not_allowed")
        assert (await send(BETA, "DELETE", "/v1/traces")).json()["deleted"] == 1
        assert (await send(BETA, "GET", "/v1/traces/mine")).status_code == 404
        assert (await send(ACME, "GET", "/v1/traces/mine")).json()["steps_count"] == 1

    made = served(use).requests
    assert {each.salt for each in made} == {"acme", "beta"}, "blocks are rooted in the salt: theirs never match"


def test_conversations_that_begin_alike_stay_with_their_tenants() -> None:
    async def use(send: Send) -> None:
        for name in (ACME, BETA):
            answer = await send(name, "POST", CHAT, chat())
            messages = [*chat()["messages"], answer.json()["choices"][0]["message"], {"role": "user", "content": "go"}]
            again = await send(name, "POST", CHAT, chat(messages=messages))
            assert again.headers["x-trace-id"] == answer.headers["x-trace-id"]
            traces.append(again.headers["x-trace-id"])

    traces: list[str] = []
    served(use)
    assert len(set(traces)) == 2


def test_limits_are_told_and_kept() -> None:
    limited = key(ACME, tenant="acme", requests_per_minute=2, tokens_per_minute=100_000)

    async def use(send: Send) -> None:
        first = await send(ACME, "POST", CHAT, chat(), origin="http://page")
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"].endswith("s")
        assert first.headers["x-ratelimit-limit-tokens"] == "100000"
        usage = first.json()["usage"]
        # The answer's own are counted when it ends; told is what was left when it began to be sent.
        left = 100_000 - usage["prompt_tokens"]
        assert left <= int(first.headers["x-ratelimit-remaining-tokens"]) < 100_000
        assert (await send(ACME, "POST", CHAT, chat(model="other"))).status_code == 404
        refused = await send(ACME, "POST", CHAT, chat(stream=True))
        assert error(refused) == (429, "rate_limit_exceeded")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert (await send(ACME, "GET", "/v1/models")).status_code == 200

    assert len(served(use, keys=(limited,)).requests) == 1


def test_tokens_of_prompts_and_answers_count() -> None:
    async def use(send: Send) -> None:
        assert (await send(ACME, "POST", CHAT, chat())).status_code == 200
        assert error(await send(ACME, "POST", CHAT, chat())) == (429, "rate_limit_exceeded")

    served(use, keys=(key(ACME, tokens_per_minute=20),))


def test_calls_at_once_are_counted_also_when_they_fail_or_leave() -> None:
    slow = FakeDispatcher(say("slowly", delay_s=0.05))

    async def use(send: Send) -> None:
        for _ in range(2):
            running = [asyncio.create_task(send(ACME, "POST", CHAT, chat())) for _ in range(3)]
            assert sorted([(await task).status_code for task in running]) == [200, 200, 429]
        for _ in range(3):
            assert (await send(ACME, "POST", CHAT, {})).status_code == 400
        leaving = asyncio.create_task(send(ACME, "POST", CHAT, chat()))
        await asyncio.sleep(0.02)
        leaving.cancel()
        await asyncio.wait([leaving])
        running = [asyncio.create_task(send(ACME, "POST", CHAT, chat())) for _ in range(2)]
        assert [(await task).status_code for task in running] == [200, 200]

    served(use, keys=(key(ACME, concurrency=2),), dispatcher=slow)


@pytest.mark.parametrize("keys", [None, KEYS])
def test_web_pages_of_the_listed_origins(keys: Sequence[Key] | None) -> None:
    async def use(send: Send) -> None:
        ask = {"access_control_request_method": "POST", "access_control_request_headers": "authorization, x-trace-id"}
        for path in (CHAT, "/v1/models", "/v1/traces/x"):
            asked = await send(None, "OPTIONS", path, origin="http://page", **ask)
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] == "http://page"
            assert "authorization" in asked.headers["access-control-allow-headers"]
            other = await send(None, "OPTIONS", path, origin="http://other", **ask)
            assert other.status_code == 400
            assert "access-control-allow-origin" not in other.headers
        for method, path, body in (("POST", CHAT, chat()), ("POST", CHAT, {}), ("GET", "/v1/models", None)):
            answer = await send(BETA, method, path, body, origin="http://page")
            assert answer.headers["access-control-allow-origin"] == "http://page"
            exposed = answer.headers["access-control-expose-headers"]
            assert {"x-ratelimit-remaining-tokens", "x-tracehaul-warning"} <= {*exposed.split(", ")}
            assert answer.headers["vary"] == "Origin"
            answer = await send(BETA, method, path, body, origin="http://other")
            assert "access-control-allow-origin" not in answer.headers
        if keys is not None:  # also what is refused can be read
            refused = await send(None, "POST", CHAT, chat(), origin="http://page")
            assert refused.headers["access-control-allow-origin"] == "http://page"
            refused = await send(None, "GET", "/v1/models", origin="http://page")
            assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://page")

    served(use, keys, config=ApiConfig(origins=("http://page",)))


def test_all_origins_and_none() -> None:
    async def use(send: Send) -> None:
        for method, path in (("POST", CHAT), ("GET", "/v1/models")):
            answer = await send(None, method, path, chat(), origin="http://any")
            told.append(answer.headers.get("access-control-allow-origin"))

    told: list[str | None] = []
    served(use, None, config=ApiConfig(origins=("*",)))
    served(use, None)
    assert told == ["*", "*", None, None]


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.fields: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "a request was answered":
            self.fields.append(record.__dict__["tracehaul_fields"])


@contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """The lines that are written meanwhile."""
    handler, logger = Lines(), logging.getLogger("router.http.visits")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield handler.fields
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("keys", "config", "lines"),
    [
        (KEYS, ApiConfig(), 4),
        (KEYS, ApiConfig(access_log=False), 0),
        (None, ApiConfig(), 0),
        (None, ApiConfig(access_log=True), 4),
        (KEYS, ApiConfig(log_content=True), 4),
    ],
)
def test_the_access_log(keys: Sequence[Key] | None, config: ApiConfig, lines: int) -> None:
    async def use(send: Send) -> None:
        headers = {"x_trace_id": "mine", "x_request_id": "one"}
        await send(ACME, "POST", CHAT, chat(messages=[{"role": "user", "content": "secret words"}]), **headers)
        await send(ACME, "POST", CHAT, chat(stream=True), x_trace_id="mine")
        await send(ACME, "POST", CHAT, chat(model="org/none"))
        await send(ACME, "GET", "/v1/traces/mine", x_request_id="two")
        await send(ACME, "GET", "/health")

    with logged() as fields:
        served(use, keys, config=config, dispatcher=FakeDispatcher(say("hidden words")))
    assert len(fields) == lines
    if not lines:
        return
    called, streamed, refused, page = fields
    assert (called["request"], called["trace"], called["status"]) == ("one", "mine", 200)
    assert called["model"] == "org/fake"
    assert called["output_tokens"] == len("hidden words") + 1
    assert called["cached_tokens"] == called["prompt_tokens"] // 2
    assert 0 <= called["first_s"] <= called["took_s"]
    assert (called["tenant"], called["key"]) == (("acme", ACME) if keys else ("", ""))
    assert streamed["status"] == 200
    assert streamed["output_tokens"] == called["output_tokens"]
    assert refused["status"] == (403 if keys else 404)
    assert (page["path"], page["request"], page["status"]) == ("/v1/traces/mine", "two", 200)
    said = json.dumps(fields)
    assert ("secret words" in said) == ("hidden words" in said) == config.log_content
    assert secret(ACME) not in said


def test_what_runs_in_the_background_has_a_line_when_it_ends() -> None:
    async def use(send: Send) -> None:
        body = {"model": "org/fake", "input": "hi", "background": True}
        for name in ("one", "two"):
            made = (await send(ACME, "POST", "/v1/responses", body, x_trace_id="mine", x_request_id=name)).json()
            if name == "two":
                await send(ACME, "POST", f"/v1/responses/{made['id']}/cancel")
            status = "queued"
            while status in ("queued", "in_progress"):
                await asyncio.sleep(0.01)
                status = (await send(ACME, "GET", f"/v1/responses/{made['id']}")).json()["status"]

    with logged() as fields:
        served(use, dispatcher=FakeDispatcher(say("hi", delay_s=0.02)))
    begun, ended, again, cancelled = [line for line in fields if line["path"] == "/v1/responses"]
    assert (begun["request"], begun["status"], "output_tokens" in begun) == ("one", 200, False)
    assert (ended["request"], ended["status"], ended["output_tokens"], ended["trace"]) == ("one", 200, 3, "mine")
    assert (ended["tenant"], ended["key"], ended["model"]) == ("acme", ACME, "org/fake")
    assert ended["took_s"] > 0
    assert (again["request"], again["status"]) == ("two", 200)
    assert (cancelled["request"], cancelled["status"]) == ("two", 499)


def test_a_file_of_keys_is_strict() -> None:
    file = KeyFile(KEYS)
    assert read_keys(write_keys(file)) == file
    assert secret(ACME).encode() not in write_keys(file)
    for wrong in (b"", b"[]", b'{"keys": [{"id": "x"}]}', b'{"keys": [], "more": 1}', write_keys(KeyFile(KEYS + KEYS))):
        with pytest.raises(BadKeys):
            read_keys(wrong)
    with pytest.raises(BadKeys):
        read_keys(write_keys(KeyFile((key(ACME, tenant="a/b"),))))
