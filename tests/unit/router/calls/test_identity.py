"""Which trace a call belongs to."""

from collections.abc import Callable

import pytest

from router.calls.call import TraceFields
from router.calls.errors import CallFailed
from router.calls.identity import Identity, foreign_id, identify
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
    ],
)
def test_every_header_that_clients_send(name: str) -> None:
    assert of({name: "abc-1"}).trace == "abc-1"


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
