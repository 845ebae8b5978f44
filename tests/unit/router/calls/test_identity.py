"""Which trace a call belongs to."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from router.calls.call import TraceFields
from router.calls.errors import CallFailed
from router.calls.identity import Identity, foreign_id, identify
from router.dialects.body import parse
from router.dialects.completions.requests import CompletionRequest
from router.http.errors import STATUS
from router.http.request_ids import request_id
from tracehaul.wire.ids import TraceId

NONE = TraceFields()


def of(
    headers: dict[str, str],
    fields: TraceFields = NONE,
    response: Callable[[str], TraceId | None] = lambda response: None,
) -> Identity:
    return identify(headers, fields, response, "fresh")


def test_a_call_that_says_nothing_is_a_trace_of_its_own() -> None:
    assert of({}) == Identity(TraceId("fresh"), None, False)
    assert of({"x-session-id": ""}, TraceFields({}, "", "")).trace == "fresh"


@pytest.mark.parametrize(
    "name",
    [
        "x-trace-id",
        "x-session-affinity",
        "x-correlation-id",
        "x-session-id",
        "x-dynamo-session-id",
        "x-claude-code-session-id",
        "session-id",
        "thread-id",
        "x-dynamo-trajectory-id",
    ],
)
def test_every_header_that_clients_send(name: str) -> None:
    assert of({name: "abc-1"}).trace == "abc-1"
    if name != "x-trace-id":
        assert of({name.replace("-", "_"): "abc-1"}).trace == "abc-1", "not every client writes dashes"
        assert of({name: " "}).trace == "fresh"


def test_every_field_that_clients_send() -> None:
    responses = {"resp_1": TraceId("earlier")}.get
    assert of({}, TraceFields(metadata={"trace_id": "m"})).trace == "m"
    assert of({}, TraceFields(prompt_cache_key="k")).trace == "k"
    assert of({}, TraceFields(previous_response_id="resp_1"), responses).trace == "earlier"
    assert of({}, TraceFields(previous_response_id="unknown"), responses).trace == "fresh"
    assert of({}, TraceFields(metadata={"trace_id": 5})).trace == "fresh"


def test_the_more_specific_name_wins() -> None:
    headers = {"x-correlation-id": "c", "x-session-id": "s"}
    fields = TraceFields({"trace_id": "m"}, "k")
    assert of(headers | {"x-trace-id": "t"}, fields).trace == "t"
    assert of(headers, fields).trace == "m"
    assert of(headers, TraceFields(prompt_cache_key="k")).trace == "s"


def test_parent_and_end() -> None:
    assert of({"x-parent-trace-id": "p", "x-trace-final": "true"}) == Identity(TraceId("fresh"), TraceId("p"), True)
    dynamo = {"x-dynamo-session-id": "s", "x-dynamo-parent-session-id": "p", "x-dynamo-session-final": "1"}
    assert of(dynamo) == Identity(TraceId("s"), TraceId("p"), True)
    assert not of({"x-trace-final": "false"}).final


CLAUDE = {"x-claude-code-session-id": "s"}


def test_agents_of_one_claude_code_session_are_traces_of_their_own() -> None:
    assert of(CLAUDE) == Identity(TraceId("s"), None, False)
    child = CLAUDE | {"x-claude-code-agent-id": "a"}
    assert of(child) == Identity(TraceId("s:a"), TraceId("s"), False)
    grandchild = CLAUDE | {"x-claude-code-agent-id": "b", "x-claude-code-parent-agent-id": "a"}
    assert of(grandchild) == Identity(TraceId("s:b"), TraceId("s:a"), False)
    assert of(CLAUDE | {"x-claude-code-agent-id": ""}).trace == "s"
    assert of(CLAUDE | {"x-claude-code-parent-agent-id": "a"}) == Identity(TraceId("s"), None, False)
    assert of(child | {"x-trace-id": "t", "x-parent-trace-id": "p"}) == Identity(TraceId("t"), TraceId("p"), False)


def test_threads_of_one_codex_session_are_traces_of_their_own() -> None:
    first = {"session-id": "s", "thread-id": "s"}
    assert of(first) == Identity(TraceId("s"), None, False)
    child = first | {"thread-id": "t"}
    assert of(child) == Identity(TraceId("t"), TraceId("s"), False)
    assert of(child | {"x-codex-parent-thread-id": "u"}) == Identity(TraceId("t"), TraceId("u"), False)
    assert of({"session_id": "s", "thread_id": "t"}) == Identity(TraceId("t"), TraceId("s"), False)
    assert of(child, TraceFields(prompt_cache_key="s")).trace == "t", "all threads share that"


def test_opencodes_and_dynamos_parents() -> None:
    opencode = {"x-session-id": "s", "x-session-affinity": "s", "x-parent-session-id": "p"}
    assert of(opencode) == Identity(TraceId("s"), TraceId("p"), False)
    assert of({"x-session-affinity": "s", "x_parent_session_id": "p"}) == Identity(TraceId("s"), TraceId("p"), False)
    dynamo = {"x-dynamo-trajectory-id": "s", "x-dynamo-parent-trajectory-id": "p", "x-dynamo-trajectory-final": "1"}
    assert of(dynamo) == Identity(TraceId("s"), TraceId("p"), True)
    assert of({"x-session-id": "s", "x-dynamo-parent-session-id": "p"}).parent == "p"
    assert of({"x-session-id": "s", "x-parent-session-id": "s"}).parent is None


@pytest.mark.parametrize(
    ("fields", "trace", "parent"),
    [
        ({"agentic_context": {"session_id": "s"}}, "s", None),
        ({"agentic_context": {"trace_id": "t", "session_id": "s", "parent_session_id": "p"}}, "t", "p"),
        ({"agentic_context": {"session_id": "s", "agent_id": "a"}}, "s:a", "s"),
        ({"agentic_context": {"task_id": "s", "agent_id": "s:a", "parent_id": "s:b"}}, "s:a", "s:b"),
        ({"agentic_context": '{"program_id": "x", "parent_program_id": "y"}'}, "x", "y"),
        ({"vllm_xargs": {"agentic_context": {"program_id": "x"}}}, "x", None),
        ({"agent_hint": {"session_id": "s", "parent_session_id": "p", "cache_control": {}}}, "s", "p"),
        ({"session_id": "s"}, "s", None),
        ({"session_id": "s", "agentic_context": {"session_id": "c"}}, "c", None),
        ({"session_id": 5, "agentic_context": [1], "vllm_xargs": "x", "agent_hint": {"session_id": {}}}, None, None),
        ({"agentic_context": "{" * 100_000}, None, None),
        ({"agentic_context": "[" * 10_000}, None, None),
        ({"agentic_context": "5", "session_id": ""}, None, None),
    ],
)
def test_what_bodies_say_of_agents(fields: dict[str, Any], trace: str | None, parent: str | None) -> None:
    body = msgspec.json.encode({"model": "m", "prompt": "x", **fields})
    said = parse(body, CompletionRequest).trace_fields
    assert (said.session, said.parent) == (trace, parent)
    found = of({"x-session-id": "header"}, said)
    assert (found.trace, found.parent) == (trace or "header", parent)


def test_our_own_headers_must_hold_ids() -> None:
    for name in ("x-trace-id", "x-parent-trace-id"):
        for value in ("", "with space", "a" * 129, "é", "a\nb"):
            with pytest.raises(CallFailed) as caught:
                of({name: value})
            assert (STATUS[caught.value.cause], caught.value.param) == (400, name)


def test_names_of_others_become_ids() -> None:
    odd = foreign_id("tenant one / été " * 50)
    assert odd == foreign_id("tenant one / été " * 50) != foreign_id("other name")
    assert len(odd) <= 128
    assert odd.isascii()
    assert of({"x-session-id": "with space"}).trace == foreign_id("with space")


def test_request_ids_are_echoed_if_they_can_be() -> None:
    assert request_id("my-id:1", "fresh") == "my-id:1"
    for bad in (None, "", "with space", "a" * 129, "é"):
        assert request_id(bad, "fresh") == "fresh"


def test_an_operator_names_a_decode_worker() -> None:
    assert of({"x-decode-worker": "decode-1"}).decode == "decode-1"
