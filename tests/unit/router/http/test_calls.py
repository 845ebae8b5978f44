"""Calls that do not stream, on both endpoints, and the pages."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import msgspec
import pytest

from router.calls.calls import choice_seed
from router.calls.fakes import IM_END, FakeDispatcher, FakeText, Script, say
from router.dispatch.steps import Finished, Output, StepRequest
from router.fleet.members import NodeStatus
from router.http.app import create_app
from router.http.config import ApiConfig
from router.policy.prices import Bill
from sim.lifespan import living
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.errors import ClusterError, ContextTooLong, InvalidRequest, Overloaded, PeerLost, Unavailable
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.ids import Generation, NodeId
from tracehaul.wire.spent import Spent
from tracehaul.wire.steps import StepUsage

CHAT: dict[str, Any] = {"model": "org/fake", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "org/fake", "prompt": "hi"}
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"


def served(
    use: Callable[[httpx.AsyncClient], Awaitable[None]],
    dispatcher: FakeDispatcher,
    text: FakeText | None = None,
    config: ApiConfig | None = None,
) -> None:
    async def main() -> None:
        app = create_app(
            dispatcher, {"org/fake": text or FakeText()}, lambda: b"steps 1\n", config or ApiConfig(), InlineOffload()
        )
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        client_of = httpx.AsyncClient(transport=transport, base_url="http://test")
        async with asyncio.timeout(20), living(app), client_of as client:
            await use(client)

    asyncio.run(main())


def post(dispatcher: FakeDispatcher, path: str, body: Any, **options: Any) -> httpx.Response:
    answers: list[httpx.Response] = []
    headers = options.pop("headers", None)

    async def use(client: httpx.AsyncClient) -> None:
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        answers.append(await client.post(path, content=content, headers=headers))

    served(use, dispatcher, **options)
    return answers[0]


def test_a_chat_completion() -> None:
    dispatcher = FakeDispatcher(say("héllo"))
    dispatcher.cost = Bill(Spent(1.0, 2.0, 4.0, 7), 7.0, 8.0)
    answer = post(dispatcher, CHAT_PATH, CHAT | {"max_tokens": 50})
    assert answer.status_code == 200
    body = answer.json()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "org/fake")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "héllo", "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]
    prompt = FakeText().encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 7,
        "total_tokens": len(prompt) + 7,
        "prompt_tokens_details": {"cached_tokens": len(prompt) // 2},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "tracehaul": {
            "resident_tokens": 3,
            "pulled_tokens": 0,
            "pulled_bytes": 7,
            "pull_s": 0.0,
            "missed_blocks": 0,
            "prefill_fallback": "",
            "hits": {
                "theoretical": len(prompt) // 2 + 1,
                "indexed": 0,
                "chosen": 0,
                "delivered": len(prompt) // 2,
                "losses": {"evicted": 1},
                "changed": None,
            },
            "cost": {
                "amount": 8.0,
                "unit": "worker seconds",
                "prefill_s": 1.0,
                "recompute_s": 2.0,
                "decode_s": 4.0,
                "moved_bytes": 7,
            },
        },
    }
    (request,) = dispatcher.requests
    assert unpack_tokens(request.prompt) == prompt
    assert (request.sampling.max_tokens, request.sampling.stop_tokens) == (50, (IM_END,))
    assert dispatcher.aborted == []


def test_a_completion() -> None:
    dispatcher = FakeDispatcher(say("yes", reason="length"))
    body = post(dispatcher, TEXT_PATH, TEXT | {"max_tokens": 3, "return_token_ids": True}).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "yes",
            "finish_reason": "length",
            "logprobs": None,
            "token_ids": list(b"yes"),
            "prompt_token_ids": list(b"hi"),
        }
    ]


def test_chat_returns_token_ids_if_asked() -> None:
    body = post(FakeDispatcher(say("yes")), CHAT_PATH, CHAT | {"return_token_ids": True}).json()
    assert body["choices"][0]["token_ids"] == [*b"yes", IM_END]
    assert body["prompt_token_ids"] == FakeText().encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_options_reach_the_step() -> None:
    dispatcher = FakeDispatcher(say("x"))
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 7,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [5, 6],
        "cache_salt": "tenant",
    }
    post(dispatcher, CHAT_PATH, CHAT | fields, headers={"X-Trace-Final": "1", "X-Parent-Trace-Id": "p"})
    (request,) = dispatcher.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 40, 7)
    assert (sampling.min_tokens, sampling.stop_tokens) == (2, (5, 6))
    assert sampling.max_tokens == 4096 - request.prompt_tokens, "unset means the rest of the window"
    assert (request.salt, request.parent, request.final) == ("tenant", "p", True)


def test_choices_have_their_own_seeds_and_the_first_is_what_one_alone_gives() -> None:
    one, three = FakeDispatcher(say("x")), FakeDispatcher(say("x"))
    post(one, CHAT_PATH, CHAT | {"seed": 7})
    body = post(three, CHAT_PATH, CHAT | {"seed": 7, "n": 3}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    seeds = [request.sampling.seed for request in three.requests]
    assert seeds[0] == one.requests[0].sampling.seed
    assert len(set(seeds)) == 3
    assert seeds == [choice_seed(7, k) for k in range(3)]
    assert len({request.step for request in three.requests}) == 3
    assert len({request.trace for request in three.requests}) == 1
    prompt_tokens = three.requests[0].prompt_tokens
    assert body["usage"]["prompt_tokens"] == prompt_tokens, "the prompt counts once"
    assert body["usage"]["completion_tokens"] == 6


def test_a_prompt_position_that_any_choice_computed_is_not_cached() -> None:
    def script(request: StepRequest) -> Script:
        first = request.step.endswith("-0")
        usage = StepUsage(prompt_tokens=2, computed_from=0 if first else 2)
        return [Output([120]), Finished("length", usage)]

    body = post(FakeDispatcher(script), TEXT_PATH, TEXT | {"n": 2}).json()
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    body = post(FakeDispatcher(script), TEXT_PATH, TEXT).json()
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_cached_tokens_are_never_more_than_the_prompt() -> None:
    script = lambda request: [Output([120]), Finished("length", StepUsage(computed_from=1000))]  # noqa: E731
    usage = post(FakeDispatcher(script), TEXT_PATH, TEXT).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[262]]),
        (["x", "y"], [[120], [121]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_all_forms_of_prompts(prompt: Any, expected: list[list[int]]) -> None:
    dispatcher = FakeDispatcher(
        lambda r: [Output(list(b"p%d" % unpack_tokens(r.prompt)[0])), Finished("length", StepUsage())]
    )
    body = post(dispatcher, TEXT_PATH, TEXT | {"prompt": prompt}).json()
    assert [unpack_tokens(request.prompt) for request in dispatcher.requests] == expected
    assert [choice["text"] for choice in body["choices"]] == [f"p{ids[0]}" for ids in expected]
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert len({request.trace for request in dispatcher.requests}) == len(expected)


def test_choices_of_several_prompts_are_in_order() -> None:
    dispatcher = FakeDispatcher(lambda r: [Output(unpack_tokens(r.prompt)[:1]), Finished("length", StepUsage())])
    body = post(dispatcher, TEXT_PATH, TEXT | {"prompt": ["a", "b"], "n": 2}).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]


def test_prompts_in_one_call_without_a_seed_have_different_ones() -> None:
    dispatcher = FakeDispatcher(say("x"))
    post(dispatcher, TEXT_PATH, TEXT | {"prompt": ["a", "a"]})
    assert len({request.sampling.seed for request in dispatcher.requests}) == 2


@pytest.mark.parametrize(
    ("prompt", "limits"),
    [
        ("", {}),
        ([[]], {}),
        ([-1], {}),
        ([2**31], {}),
        ([264], {}),
        (["a", 1], {}),
        ([[i] for i in range(65)], {}),
    ],
)
def test_prompts_that_are_refused(prompt: Any, limits: dict[str, Any]) -> None:
    dispatcher = FakeDispatcher(say("x"))
    answer = post(dispatcher, TEXT_PATH, TEXT | {"prompt": prompt} | limits)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert dispatcher.requests == []


def test_stop_tokens_must_be_the_models_own() -> None:
    answer = post(FakeDispatcher(say("x")), CHAT_PATH, CHAT | {"stop_token_ids": [10**6]})
    assert answer.json()["error"]["param"] == "stop_token_ids"


def test_too_many_choices_are_refused() -> None:
    answer = post(FakeDispatcher(say("x")), CHAT_PATH, CHAT | {"n": 5}, config=ApiConfig(choices_max=4))
    assert answer.json()["error"]["param"] == "n"


def test_a_stop_string_ends_the_step_and_the_usage_is_still_right() -> None:
    dispatcher = FakeDispatcher(say("hello world, and much more", delay_s=0.002))
    body = post(dispatcher, CHAT_PATH, CHAT | {"stop": ["zzz", "o w"]}).json()
    assert body["choices"][0]["message"]["content"] == "hell"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 7
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == body["usage"]["prompt_tokens"] // 2
    assert dispatcher.aborted == [dispatcher.requests[0].step]
    assert dispatcher.running == 0


@pytest.mark.parametrize(
    ("fields", "context_max"), [({}, 21), ({"max_tokens": 10}, 20), ({"max_completion_tokens": 4096}, 12)]
)
def test_what_does_not_fit_the_window_is_refused_before_any_work(fields: dict[str, Any], context_max: int) -> None:
    dispatcher = FakeDispatcher(say("x"), context_max)
    answer = post(dispatcher, CHAT_PATH, CHAT | fields | {"stream": True})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert dispatcher.requests == []


def test_unknown_models() -> None:
    for path, body in ((CHAT_PATH, CHAT), (TEXT_PATH, TEXT)):
        answer = post(FakeDispatcher(say("x")), path, body | {"model": "other"})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")


def test_no_worker_is_ready() -> None:
    dispatcher = FakeDispatcher(say("x"))
    dispatcher.card = None
    answer = post(dispatcher, CHAT_PATH, CHAT)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "unavailable"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ContextTooLong("too long"), 400, "context_length_exceeded"),
        (InvalidRequest("bad"), 400, "invalid_request"),
        (Overloaded("full"), 503, "overloaded"),
        (Unavailable("nobody"), 503, "unavailable"),
        (PeerLost("gone"), 503, "peer_lost"),
        (ClusterError("odd"), 500, "internal"),
        (ZeroDivisionError("secret detail"), 500, "internal"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token_have_a_status(error: Exception, status: int, code: str, stream: bool) -> None:
    dispatcher = FakeDispatcher(lambda request: [error])
    answer = post(dispatcher, CHAT_PATH, CHAT | {"stream": stream})
    body = answer.json()["error"]
    assert (answer.status_code, body["code"]) == (status, code)
    assert ("retry-after" in answer.headers) == (status == 503)
    assert "secret" not in body["message"]
    assert answer.headers["x-trace-id"]


def test_one_failed_choice_fails_the_call_and_ends_the_others() -> None:
    def script(request: StepRequest) -> Script:
        return [0.01, PeerLost("gone")] if request.step.endswith("-1") else [Output([120]), 60.0]

    dispatcher = FakeDispatcher(script)
    assert post(dispatcher, CHAT_PATH, CHAT | {"n": 3}).status_code == 503
    assert (dispatcher.running, len(dispatcher.aborted)) == (0, 2)


def test_a_step_without_an_end_is_an_error() -> None:
    assert post(FakeDispatcher(lambda request: [Output([120])]), CHAT_PATH, CHAT).status_code == 500


def test_a_template_that_refuses() -> None:
    body = CHAT | {"messages": [{"role": "user", "content": "refuse"}]}
    answer = post(FakeDispatcher(say("x")), CHAT_PATH, body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b'{"model": "\xff"}', b'{"model": 1}'])
def test_bodies_that_are_refused(body: bytes) -> None:
    answer = post(FakeDispatcher(say("x")), CHAT_PATH, body)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_long_bodies_are_refused() -> None:
    config = ApiConfig(body_bytes_max=1000)
    body = CHAT | {"user": "x" * 2000}
    assert post(FakeDispatcher(say("x")), CHAT_PATH, body, config=config).status_code == 413

    async def use(client: httpx.AsyncClient) -> None:
        async def parts() -> Any:
            for _ in range(10):
                yield b" " * 500

        answer = await client.post(CHAT_PATH, content=parts())
        assert answer.status_code == 413

    served(use, FakeDispatcher(say("x")), config=config)


def test_the_limit_of_calls_in_progress() -> None:
    dispatcher = FakeDispatcher(say("hello", delay_s=0.02))

    async def use(client: httpx.AsyncClient) -> None:
        answers = await asyncio.gather(*(client.post(CHAT_PATH, json=CHAT) for _ in range(5)))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200, 200, 503, 503, 503]
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert (refused.json()["error"]["code"], refused.headers["retry-after"]) == ("overloaded", "1")
        assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200, "ended calls make room"

    served(use, dispatcher, config=ApiConfig(requests_max=2))


def test_ids_are_echoed_or_made() -> None:
    dispatcher = FakeDispatcher(say("x"))
    answer = post(dispatcher, CHAT_PATH, CHAT, headers={"X-Trace-Id": "t-1", "X-Request-Id": "r-1"})
    assert (answer.headers["x-trace-id"], answer.headers["x-request-id"]) == ("t-1", "r-1")
    assert dispatcher.requests[0].trace == "t-1"
    answer = post(dispatcher, CHAT_PATH, CHAT)
    assert answer.headers["x-trace-id"] == dispatcher.requests[1].trace
    assert len(answer.headers["x-request-id"]) == 32
    answer = post(dispatcher, CHAT_PATH, CHAT, headers={"X-Trace-Id": "no id"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-trace-id")


def test_a_response_can_be_continued_by_its_id() -> None:
    dispatcher = FakeDispatcher(say("x"))

    async def use(client: httpx.AsyncClient) -> None:
        first = (await client.post(CHAT_PATH, json=CHAT)).json()
        await client.post(CHAT_PATH, json=CHAT | {"previous_response_id": first["id"]})

    served(use, dispatcher)
    assert dispatcher.requests[0].trace == dispatcher.requests[1].trace


def test_the_next_step_keeps_the_ids_of_the_last() -> None:
    text = FakeText()
    dispatcher = FakeDispatcher(say("the abc"))  # byte by byte, where the tokenizer would merge

    async def use(client: httpx.AsyncClient) -> None:
        headers = {"X-Trace-Id": "t"}
        answer = (await client.post(CHAT_PATH, json=CHAT, headers=headers)).json()
        message = answer["choices"][0]["message"]
        follow = [*CHAT["messages"], message, {"role": "user", "content": "go on"}]
        await client.post(CHAT_PATH, json=CHAT | {"messages": follow}, headers=headers)
        salted = CHAT | {"messages": follow, "cache_salt": "other"}
        await client.post(CHAT_PATH, json=salted, headers=headers)

    served(use, dispatcher, text)
    first, second, other = (unpack_tokens(request.prompt) for request in dispatcher.requests)
    spoken = [*first, *b"the abc", IM_END]
    assert second[: len(spoken)] == spoken
    assert other == FakeText().encode(text.encoded[-1]), "tenants share no texts"
    assert other[: len(spoken)] != spoken


def test_after_a_stop_string_the_next_prompt_is_read_afresh() -> None:
    text, dispatcher = FakeText(), FakeDispatcher(say("the abc"))

    async def use(client: httpx.AsyncClient) -> None:
        headers = {"X-Trace-Id": "t"}
        answer = (await client.post(CHAT_PATH, json=CHAT | {"stop": "bc"}, headers=headers)).json()
        message = answer["choices"][0]["message"]
        assert message["content"] == "the a"
        await client.post(CHAT_PATH, json=CHAT | {"messages": [*CHAT["messages"], message]}, headers=headers)

    served(use, dispatcher, text)
    whole = FakeText().render([*CHAT["messages"], {"role": "assistant", "content": "the a"}])
    assert unpack_tokens(dispatcher.requests[1].prompt) == FakeText().encode(whole)


def test_pages() -> None:
    dispatcher = FakeDispatcher(say("x"))
    info = NodeInfo(NodeId("decode-0"), Generation(3), "decode", "h:1", model="org/fake", root=bytes(16))  # type: ignore[arg-type]
    dispatcher.statuses = [NodeStatus(info, NodeLoad(running=2), "suspect", 4.5)]

    async def use(client: httpx.AsyncClient) -> None:
        models = (await client.get("/v1/models")).json()
        assert models["object"] == "list"
        assert [model["id"] for model in models["data"]] == ["org/fake"]
        model = (await client.get("/v1/models/org/fake")).json()
        assert model == models["data"][0]
        assert model["object"] == "model"
        missing = await client.get("/v1/models/org/other")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")

        metrics = await client.get("/metrics")
        assert metrics.content == b"steps 1\n"
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        (node,) = (await client.get("/cluster")).json()
        assert (node["info"]["node"], node["load"]["running"], node["health"]) == ("decode-0", 2, "suspect")

        assert (await client.get("/health")).status_code == 200
        dispatcher.card = None
        health = await client.get("/health")
        assert health.status_code == 503
        assert health.json() == {
            "status": "unavailable",
            "reason": "no decode worker is ready: decode-0 is suspect",
        }
        assert (await client.get("/v1/models")).json()["data"] == []
        dispatcher.statuses = []
        assert (await client.get("/health")).json()["reason"] == "no decode worker has joined"

        for method, path, status in (("GET", "/nope", 404), ("GET", CHAT_PATH, 405), ("DELETE", "/health", 405)):
            answer = await client.request(method, path, headers={"X-Request-Id": "r"})
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert answer.headers["x-request-id"] == "r"

    served(use, dispatcher)


def test_a_page_that_fails_tells_no_details() -> None:
    async def main() -> None:
        def broken() -> bytes:
            raise ZeroDivisionError("secret")

        app = create_app(FakeDispatcher(say("x")), {"org/fake": FakeText()}, broken, ApiConfig(), InlineOffload())
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.get("/metrics")
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert answer.json()["error"]["code"] == "internal"

    asyncio.run(main())
