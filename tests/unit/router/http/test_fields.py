"""What agents send beside the messages: it has an effect, is told as null, or is refused by name."""

import asyncio
import re
from typing import Any

import httpx
import msgspec
import pytest

from router.calls.fakes import IM_END, IM_START, FakeDispatcher, FakeText, Script, say
from router.dispatch.steps import Finished, Output, StepRequest
from router.http.app import create_app
from router.http.config import ApiConfig
from sim.lifespan import living
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.steps import StepUsage

USER: dict[str, Any] = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"model": "org/fake", "messages": [USER]}
TEXT: dict[str, Any] = {"model": "org/fake", "prompt": "hi"}
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "description": "d"}}


def post(
    dispatcher: FakeDispatcher,
    path: str,
    body: Any,
    text: FakeText | None = None,
    headers: dict[str, str] | None = None,
) -> httpx.Response:
    async def main() -> httpx.Response:
        app = create_app(dispatcher, {"org/fake": text or FakeText()}, lambda: b"", ApiConfig(), InlineOffload())
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        client_of = httpx.AsyncClient(transport=transport, base_url="http://test")
        async with asyncio.timeout(20), living(app), client_of as client:
            content = body if isinstance(body, bytes) else msgspec.json.encode(body)
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(main())


def asked(path: str, body: Any, **options: Any) -> StepRequest:
    """The step that a call becomes."""
    dispatcher = FakeDispatcher(say("x"))
    answer = post(dispatcher, path, body, **options)
    assert answer.status_code == 200, answer.text
    (request,) = dispatcher.requests
    return request


class Spelled(FakeText):
    """Shows what its prompts are made of."""

    def shown(self, tokens: bytes) -> str:
        return "".join(self.token_text(token) for token in unpack_tokens(tokens))


def prompt(body: Any) -> str:
    return Spelled().shown(asked(CHAT_PATH, body).prompt)


def refused(body: Any, path: str = CHAT_PATH, text: FakeText | None = None) -> dict[str, Any]:
    dispatcher = FakeDispatcher(say("x"))
    answer = post(dispatcher, path, body, text)
    assert (answer.status_code, dispatcher.requests) == (400, [])
    return answer.json()["error"]


# --- the window -----------------------------------------------------------------------------------------------------


def test_clients_know_an_overflow_by_its_words() -> None:
    dispatcher = FakeDispatcher(say("x"), 100)
    error = post(dispatcher, CHAT_PATH, CHAT | {"messages": [{"role": "user", "content": "word " * 100}]}).json()[
        "error"
    ]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    message = error["message"]
    assert "this model's maximum context length is" in message.lower(), "LiteLLM"
    assert re.search(r"maximum context length is \d+ tokens", message), "pi, opencode"
    assert "reduce the length of the messages" in message


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_output_than_the_window_has_is_what_is_left(field: str) -> None:
    dispatcher = FakeDispatcher(say("x" * 79, reason="length"), 100)
    answer = post(dispatcher, CHAT_PATH, CHAT | {field: 32_000})
    (request,) = dispatcher.requests
    assert request.sampling.max_tokens == 100 - request.prompt_tokens == 79
    usage = answer.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (21, 79, 100)
    assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_a_completion_without_max_tokens_has_sixteen() -> None:
    assert asked(TEXT_PATH, TEXT).sampling.max_tokens == 16
    assert asked(TEXT_PATH, TEXT | {"max_tokens": 17}).sampling.max_tokens == 17


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (rb"abc \ud83d def", "abc \ufffd def"),
        (rb"\ud83d", "\ufffd"),
        (rb"\ud83d\ud83d\ude42\ude42", "\ufffd\U0001f642\ufffd"),
        (rb"\uDE42\n", "\ufffd\n"),
        (rb"\\ud83d \\\ud83d", "\\ud83d \\\ufffd"),
        (b"abc \xed\xa0\xbd", "abc \ufffd"),
    ],
)
def test_halves_of_surrogate_pairs_do_not_end_a_conversation(sent: bytes, read: str) -> None:
    dispatcher = FakeDispatcher(say("x"))
    body = b'{"model":"org/fake","messages":[{"role":"user","content":"%b"}]}' % sent
    answer = post(dispatcher, CHAT_PATH, body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-tracehaul-warning"] == "halves of surrogate pairs were read as U+FFFD"
    expected = FakeText().encode(f"<|im_start|>user\n{read}<|im_end|>\n<|im_start|>assistant\n")
    assert unpack_tokens(dispatcher.requests[0].prompt) == expected


@pytest.mark.parametrize(
    "sent", [rb"\ud83d", rb"\ud83d\n", rb"\ud83d\u0041", b"\xff", b"a\0b", rb"\x", rb"\ud83d" + b"\0"]
)
def test_what_is_no_json_for_other_reasons_is_refused_as_ever(sent: bytes) -> None:
    body = b'{"model":"org/fake","messages":[{"role":"user","content":"%b"]' % sent
    error = refused(body)
    assert error["code"] == "invalid_json"


def test_whole_pairs_are_read_without_a_word() -> None:
    body = rb'{"model":"org/fake","messages":[{"role":"user","content":"\ud83d\ude42 \\ud83d"}]}'
    answer = post(FakeDispatcher(say("x")), CHAT_PATH, body)
    assert (answer.status_code, "x-tracehaul-warning" in answer.headers) == (200, False)


def test_a_tool_may_have_said_nothing() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": calls}]
    for said in ({"content": None}, {}, {"content": []}):
        assert "<|im_start|>tool\n<|im_end|>" in prompt(CHAT | {"messages": [*messages, {"role": "tool"} | said]})


# --- the chat template ----------------------------------------------------------------------------------------------


def test_the_chat_templates_variables_are_passed_on() -> None:
    told = prompt(CHAT | {"chat_template_kwargs": {"enable_thinking": False, "deep": {"a": [1, None]}}})
    assert told.startswith('<|im_start|>variables\n{"deep": {"a": [1, null]}, "enable_thinking": false}<|im_end|>')
    assert prompt(CHAT | {"chat_template_kwargs": {}}) == prompt(CHAT)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token", "raise_exception"])
def test_what_templates_are_always_given_is_not_the_clients_to_say(name: str) -> None:
    assert refused(CHAT | {"chat_template_kwargs": {name: []}})["param"] == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({"reasoning_effort": "none"}, '{"enable_thinking": false, "reasoning_effort": "none"}'),
        ({"reasoning_effort": "minimal"}, '{"enable_thinking": false, "reasoning_effort": "minimal"}'),
        ({"reasoning_effort": "high"}, '{"enable_thinking": true, "reasoning_effort": "high"}'),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            '{"enable_thinking": true, "reasoning_effort": "none"}',
        ),
    ],
)
def test_how_much_to_think_is_for_the_template_to_say(fields: dict[str, Any], variables: str) -> None:
    assert prompt(CHAT | fields).startswith(f"<|im_start|>variables\n{variables}<|im_end|>")


def test_the_prompt_may_end_with_the_messages() -> None:
    assert prompt(CHAT | {"add_generation_prompt": False}) == "<|im_start|>user\nhi<|im_end|>\n"
    assert prompt(CHAT | {"add_generation_prompt": True}) == prompt(CHAT)


@pytest.mark.parametrize("fields", [{}, {"add_generation_prompt": False}])
def test_the_last_message_may_go_on(fields: dict[str, Any]) -> None:
    messages = [USER, {"role": "assistant", "content": "Once upon a "}]
    told = prompt(CHAT | {"messages": messages, "continue_final_message": True} | fields)
    assert told == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nOnce upon a "


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [USER]}, "continue_final_message"),
        ({"messages": []}, "continue_final_message"),
        ({"add_generation_prompt": True}, "add_generation_prompt"),
    ],
)
def test_what_cannot_go_on_is_refused(fields: dict[str, Any], param: str) -> None:
    body = CHAT | {"messages": [USER, {"role": "assistant", "content": "x"}], "continue_final_message": True}
    assert refused(body | fields)["param"] == param


def test_a_template_that_does_not_show_the_last_message_cannot_go_on() -> None:
    class Mute(FakeText):
        def render(self, *arguments: Any, **options: Any) -> str:
            return "<|im_start|>"

    body = CHAT | {"messages": [USER, {"role": "assistant", "content": "x"}], "continue_final_message": True}
    assert refused(body, text=Mute())["param"] == "continue_final_message"


# --- what output shows ----------------------------------------------------------------------------------------------


def ending(*tokens: int) -> FakeDispatcher:
    def script(request: StepRequest) -> Script:
        return [*(Output([token]) for token in tokens), Finished("stop", StepUsage())]

    return FakeDispatcher(script)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_may_be_shown(stream: bool) -> None:
    for stops in (["o w"], ["zzz", "world", "o w"]):
        fields: dict[str, Any] = {"stop": stops, "include_stop_str_in_output": True, "stream": stream}
        answer = post(FakeDispatcher(say("hello world")), TEXT_PATH, TEXT | fields | {"max_tokens": 50})
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        bodies = [msgspec.json.decode(data) for data in events] if stream else [answer.json()]
        assert "".join(body["choices"][0]["text"] for body in bodies) == "hello w"
        assert bodies[-1]["choices"][0]["finish_reason"] == "stop"


def test_special_tokens_may_be_shown() -> None:
    tokens = (*b"a", IM_START, *b"b", IM_END)

    def said(**fields: Any) -> str:
        return post(ending(*tokens), TEXT_PATH, TEXT | fields).json()["choices"][0]["text"]

    assert said() == said(skip_special_tokens=True) == "ab"
    assert said(skip_special_tokens=False) == "a<|im_start|>b"
    assert said(skip_special_tokens=False, include_stop_str_in_output=True) == "a<|im_start|>b<|im_end|>"
    assert said(include_stop_str_in_output=True) == "ab"


def test_a_text_that_shows_more_than_others_is_not_taken_for_a_prompts() -> None:
    """What it was generated from would be rendered for it, markers and all."""
    dispatcher, text = ending(*b"a", IM_START, *b"b", IM_END), FakeText()
    fields = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    answer = post(dispatcher, CHAT_PATH, CHAT | fields, text, {"X-Trace-Id": "t"})
    assert answer.json()["choices"][0]["message"]["content"] == "a<|im_start|>b<|im_end|>"
    trace = next(dispatcher.traces.all())
    assert all("b" not in kept.text.removeprefix("<|im_start|>user\nhi") for kept in trace.texts)


def test_a_suffix_needs_a_model_that_fills_in() -> None:
    class Infilling(FakeText):
        def encode(self, text: str, special: bool = False) -> list[int]:
            return (
                [7] if text in ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>") else super().encode(text, special)
            )

    error = refused(TEXT | {"suffix": "}"}, TEXT_PATH)
    assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")
    request = asked(TEXT_PATH, TEXT | {"suffix": "}"}, text=Infilling())
    assert Spelled().shown(request.prompt) == "<|fim_prefix|>hi<|fim_suffix|>}<|fim_middle|>"
    assert asked(TEXT_PATH, TEXT | {"suffix": ""}).prompt == asked(TEXT_PATH, TEXT).prompt
    assert refused(TEXT | {"suffix": "}", "echo": True}, TEXT_PATH, Infilling())["param"] == "echo"
    assert refused({"model": "org/fake", "prompt": [1], "suffix": "}"}, TEXT_PATH, Infilling())["param"] == "suffix"


# --- accepted, and told ---------------------------------------------------------------------------------------------


def test_priority_is_the_steps_unless_a_header_says_another() -> None:
    for path, body in ((CHAT_PATH, CHAT), (TEXT_PATH, TEXT)):
        assert asked(path, body).priority == 0
        assert asked(path, body | {"priority": -3}).priority == -3
        assert asked(path, body | {"priority": 3}, headers={"X-Priority": "5"}).priority == 5


def told(template: str | None = None, **fields: Any) -> list[dict[str, Any]]:
    """The objects of an answer, whole and streamed."""
    text = FakeText()
    text.chat_template = template
    whole = post(FakeDispatcher(say("x")), CHAT_PATH, CHAT | fields, text).json()
    streamed = post(FakeDispatcher(say("x")), CHAT_PATH, CHAT | fields | {"stream": True}, text).text
    return [whole, *(msgspec.json.decode(line[6:]) for line in streamed.splitlines() if line.startswith("data: {"))]


def test_an_answer_tells_the_service_tier_that_was_used() -> None:
    whole, *chunks = told()
    assert whole["service_tier"] is None
    assert not any("service_tier" in chunk for chunk in chunks)
    for tier in ("auto", "default", "priority", "scale"):
        assert {answer["service_tier"] for answer in told(service_tier=tier)} == {"default"}
    assert {answer["service_tier"] for answer in told(service_tier="flex")} == {"flex"}


def test_what_has_no_effect_is_told_as_null() -> None:
    assert not any({"store", "reasoning_effort"} & answer.keys() for answer in told(store=False))
    for answer in told(store=True, reasoning_effort="low"):
        assert (answer["store"], answer["reasoning_effort"]) == (None, None)
    for answer in told(priority=3):
        assert answer["priority"] is None
    assert not any("priority" in answer for answer in told())
    for path, body in ((TEXT_PATH, TEXT), ("/v1/responses", {"model": "org/fake", "input": "hi"})):
        for fields in ({}, {"priority": 3}):
            answer = post(FakeDispatcher(say("x")), path, body | fields).json()
            assert answer.get("priority", 0) == (None if fields else 0)
    for template in ("{% if enable_thinking %}", "{{ reasoning_effort }}"):
        assert {answer["reasoning_effort"] for answer in told(template, reasoning_effort="low")} == {"low"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reasoning_effort", 3),
        ("service_tier", True),
        ("store", 1),
        ("priority", "1"),
        ("chat_template_kwargs", "x"),
        ("add_generation_prompt", "no"),
        ("max_tokens", "many"),
    ],
)
def test_wrong_types_are_refused_by_name(field: str, value: Any) -> None:
    assert refused(CHAT | {field: value})["param"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [("truncate_prompt_tokens", 5), ("best_of", 2), ("chat_template", "{{ x }}"), ("prompt_logprobs", 1)],
)
def test_what_cannot_be_done_is_refused_by_name(field: str, value: Any) -> None:
    error = refused(CHAT | {field: value})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


# --- known noise ----------------------------------------------------------------------------------------------------

BILLING = "x-anthropic-billing-header: cc_version=2.1.202.a7e; cc_entrypoint=cli; cch={}; cc_prev_req=req_{};"


def test_what_changes_from_call_to_call_is_left_out_of_the_prompt() -> None:
    def ask(*system: dict[str, Any]) -> tuple[str, str | None]:
        dispatcher = FakeDispatcher(say("x"))
        answer = post(dispatcher, CHAT_PATH, CHAT | {"messages": [*system, USER]})
        return Spelled().shown(dispatcher.requests[0].prompt), answer.headers.get("x-tracehaul-warning")

    rules = {"role": "system", "content": "You are an agent.\nBe brief."}
    plain = ask(rules)
    assert plain[1] is None
    for at in range(2):
        line = BILLING.format(at, at * 7)
        parts = [{"type": "text", "text": line}, {"type": "text", "text": rules["content"]}]
        for system in (
            [{"role": "system", "content": f"{line}\n\n{rules['content']}"}],
            [{"role": "system", "content": parts}],
            [{"role": "system", "content": line}, rules],
            [{"role": "developer", "content": f"{line}\n{rules['content']}"}],
        ):
            assert ask(*system) == (plain[0], "x-anthropic-billing-header was left out")


def test_only_the_systems_preamble_is_noise() -> None:
    line = BILLING.format(1, 2)
    quoted = [{"role": "system", "content": f"Remove `{line}` from logs."}, {"role": "user", "content": line}]
    dispatcher = FakeDispatcher(say("x"))
    answer = post(dispatcher, CHAT_PATH, CHAT | {"messages": quoted})
    assert Spelled().shown(dispatcher.requests[0].prompt).count(line) == 2
    assert "x-tracehaul-warning" not in answer.headers


def test_marks_for_a_cache_do_not_reach_the_prompt() -> None:
    class Listing(FakeText):
        tools: Any = None

        def render(self, messages: Any, tools: Any = None, *arguments: Any, **options: Any) -> str:
            self.tools = tools
            return super().render(messages, tools, *arguments, **options)

    mark = {"cache_control": {"type": "ephemeral"}}
    inside = {"type": "function", "function": TOOL["function"] | mark}
    for tool in (TOOL | mark, inside):
        text, dispatcher = Listing(), FakeDispatcher(say("x"))
        answer = post(dispatcher, CHAT_PATH, CHAT | {"tools": [TOOL, tool]}, text)
        assert text.tools == [TOOL, TOOL]
        assert answer.headers["x-tracehaul-warning"] == "cache_control was left out"
    parts = [{"type": "text", "text": "hi"} | mark]
    assert prompt(CHAT | {"messages": [{"role": "user", "content": parts}]}) == prompt(CHAT)
