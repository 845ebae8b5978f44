"""What is accepted, what is refused, and how that is said."""

from typing import Any

import msgspec
import pytest

from router.calls.call import Options
from router.calls.errors import CallFailed
from router.calls.prompts import output_budget
from router.dialects.body import parse
from router.dialects.chat.requests import ChatRequest
from router.dialects.completions.requests import CompletionRequest, split
from router.dialects.openai.errors import error_body
from router.dialects.openai.requests import options
from router.dialects.openai.tools import tools_of
from router.dispatch.steps import ModelCard
from router.http.errors import STATUS

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse(msgspec.json.encode(CHAT | fields), ChatRequest)


def text(**fields: Any) -> CompletionRequest:
    return parse(msgspec.json.encode(TEXT | fields), CompletionRequest)


def refused(call: Any) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        call()
    assert STATUS[caught.value.cause] == 400
    assert error_body(caught.value).error.type == "invalid_request_error"
    assert error_body(caught.value).error.message
    return caught.value


def test_defaults() -> None:
    assert options(chat()) == Options(
        stream=False,
        include_usage=False,
        continuous_usage=False,
        max_tokens=None,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias=(),
        logprobs=None,
        echo=False,
        seed=None,
        stops=(),
        stop_token_ids=(),
        min_tokens=0,
        ignore_eos=False,
        n=1,
        return_token_ids=False,
    )
    assert chat().tenant == ""


def test_nulls_and_no_ops_and_unknown_fields_change_nothing() -> None:
    nulls = {name: None for name in ChatRequest.__struct_fields__ if name not in ("model", "messages")}
    assert options(chat(**nulls)) == options(chat())
    no_ops: dict[str, Any] = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_p": 0.0,
        "logit_bias": {},
        "best_of": 1,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "tools": [],
        "logprobs": False,
        "functions": [],
        "modalities": ["text"],
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "some_field_of_next_year": {"deep": [1, None]},
        "store": True,
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
        "service_tier": "auto",
    }
    assert options(chat(**no_ops)) == options(chat())
    assert options(text(logprobs=None, echo=False, suffix=None, best_of=1)) == options(text())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ],
)
def test_what_cannot_be_honoured_is_said(fields: dict[str, Any], param: str) -> None:
    error = refused(lambda: options(chat(**fields)))
    assert (error.param, error.code) == (param, "unsupported_parameter")


@pytest.mark.parametrize("fields", [{"best_of": 2}, {"best_of": 3, "n": 2}, {"prompt_logprobs": 1}])
def test_what_completions_cannot_honour_is_said(fields: dict[str, Any]) -> None:
    error = refused(lambda: options(text(**fields)))
    assert (error.param, error.code) == (next(iter(fields)), "unsupported_parameter")


def test_the_best_of_as_many_is_each() -> None:
    assert options(text(best_of=2, n=2)) == options(text(n=2))
    assert options(text(best_of=1)) == options(text(best_of=0)) == options(text())


def test_a_completion_has_sixteen_tokens_unless_more_are_asked_for() -> None:
    assert options(text()).max_tokens == 16
    assert options(text(max_tokens=None, echo=True)).max_tokens == 16
    assert options(text(max_tokens=17)).max_tokens == 17
    assert options(chat()).max_tokens is None


def test_sampling_parameters() -> None:
    fields: dict[str, Any] = {
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "logit_bias": {"7": -100, "5": 1.5},
    }
    for request in (chat(**fields), text(**fields)):
        got = options(request)
        assert (got.min_p, got.repetition_penalty, got.presence_penalty, got.frequency_penalty) == (0.1, 1.1, -2, 0.5)
        assert got.logit_bias == ((5, 1.5), (7, -100.0))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"logprobs": None, "top_logprobs": None}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": None}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_a_chats_logprobs(fields: dict[str, Any], expected: int | None) -> None:
    assert options(chat(**fields)).logprobs == expected


@pytest.mark.parametrize(("wanted", "expected"), [(None, None), (False, None), (0, 0), (5, 5), (20, 20)])
def test_a_completions_logprobs(wanted: Any, expected: int | None) -> None:
    assert options(text(logprobs=wanted)).logprobs == expected


def test_only_an_echo_may_be_all_that_is_wanted() -> None:
    assert options(text(echo=True, max_tokens=0)).max_tokens == 0
    assert refused(lambda: options(text(max_tokens=0))).param == "max_tokens"


@pytest.mark.parametrize("wanted", [-1, 21, 10**30])
def test_logprobs_out_of_range(wanted: int) -> None:
    assert refused(lambda: options(text(logprobs=wanted))).param == "logprobs"
    assert refused(lambda: options(chat(logprobs=True, top_logprobs=wanted))).param == "top_logprobs"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": "x" * 5000}, "stop"),
        ({"stop_token_ids": list(range(1000))}, "stop_token_ids"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 0, "logprobs": False}, "top_logprobs"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(2000)}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 1000}, "cache_salt"),
        ({"priority": 10**7}, "priority"),
    ],
)
def test_values_out_of_range_name_their_field(fields: dict[str, Any], param: str) -> None:
    assert refused(lambda: options(chat(**fields))).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 5}, "model"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": [1]}, "stop[0]"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"metadata": [1]}, "metadata"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"service_tier": 1}, "service_tier"),
        ({"store": "yes"}, "store"),
        ({"priority": "high"}, "priority"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"messages": [{"role": "assistant", "reasoning": 5}]}, "messages[0].reasoning"),
        ({"best_of": 1.5}, "best_of"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens"),
    ],
)
def test_wrong_types_name_their_field(fields: dict[str, Any], param: str) -> None:
    assert refused(lambda: chat(**fields)).param == param


def test_missing_fields_are_named() -> None:
    for body, param in ((b"{}", "messages"), (b'{"messages":[{}]}', "messages[0].role")):
        error = refused(lambda body=body: parse(body, ChatRequest))
        assert (error.param, error.code) == (param, "missing_required_parameter")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nope",
        b"{",
        b'{"model":"m","messages":[]} trailing',
        b'{"model":"m","temperature":NaN,"messages":[]}',
        b'{"model":"m","temperature":Infinity,"messages":[]}',
        b'{"model":"m","temperature":1e999,"messages":[]}',
        b'{"model":"m","seed":1' + b"0" * 100_000 + b',"messages":[]}',
        b'{"model":"m","user":"\xff\xfe","messages":[]}',
        b'{"model":"m","user":"\\ud800","messages":[]}',
        b'{"model":"m","user":"\\ud800abcdefgh","messages":[]}',
        b'{"model":"m","user":"\\udc00\\ud800","messages":[]}',
        b"[" * 100_000,
        b'{"model":"m","metadata":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b',"messages":[]}',
        b"[1, 2]",
        b"null",
        b"\xef\xbb\xbf{}",
    ],
)
def test_hostile_bodies_are_refused(body: bytes) -> None:
    refused(lambda: parse(body, ChatRequest))


def test_paired_surrogates_are_one_character() -> None:
    request = parse(b'{"model":"m","prompt":"\\ud83d\\ude42"}', CompletionRequest)
    assert request.prompt == "🙂"


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert options(chat(max_tokens=5, max_completion_tokens=7)).max_tokens == 7
    assert options(text(max_tokens=5)).max_tokens == 5


def test_sampling_edges() -> None:
    greedy = options(chat(top_p=0))
    assert (greedy.temperature, greedy.top_p) == (0.0, 1.0)
    assert options(chat(top_k=-1)).top_k == 0
    assert options(chat(stop="END")).stops == ("END",)
    assert options(chat(seed=-(2**63))).seed == -(2**63)


def test_streams_may_ask_for_usage() -> None:
    opts = options(chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}))
    assert (opts.include_usage, opts.continuous_usage) == (True, True)
    only = options(chat(stream=True, stream_options={"continuous_usage_stats": True}))
    assert (only.include_usage, only.continuous_usage) == (False, False)


def test_tools_are_told_unless_none_is_to_be_used() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    told = tools_of(tools, None, None)
    assert told is not None
    assert told.told == tools
    assert tools_of(tools, "none", None) is None
    assert tools_of([], None, None) is None


def test_the_four_forms_of_a_prompt() -> None:
    assert split("a") == ["a"]
    assert split(["a", "b"]) == ["a", "b"]
    assert split([1, 2]) == [[1, 2]]
    assert split([[1], [2, 3]]) == [[1], [2, 3]]
    for bad in ([], [[]], ["a", 1], [1, [2]], ["a", []]):
        assert refused(lambda bad=bad: split(bad)).param == "prompt"


def test_the_window_limits_output() -> None:
    card = ModelCard("m", 100)
    assert output_budget(60, None, card, "messages") == 40
    assert output_budget(60, 40, card, "messages") == 40
    assert output_budget(99, None, card, "messages") == 1
    assert output_budget(60, 32_000, card, "messages") == 40, "clients send what their model could say at most"
    for prompt, wanted in ((100, None), (101, None), (100, 1)):
        error = refused(lambda prompt=prompt, wanted=wanted: output_budget(prompt, wanted, card, "messages"))
        assert (error.param, error.code) == ("messages", "context_length_exceeded")


def test_overflow_is_told_in_the_words_that_clients_look_for() -> None:
    for wanted, output in ((None, 1), (40, 40)):
        error = refused(lambda wanted=wanted: output_budget(120, wanted, ModelCard("m", 100), "messages"))
        assert str(error) == (
            f"This model's maximum context length is 100 tokens. However, you requested {120 + output} tokens "
            f"(120 in the messages, {output} in the completion). "
            "Please reduce the length of the messages or completion."
        )
