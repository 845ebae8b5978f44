"""Calls of the background."""

import pytest

from router.calls.fakes import FakeDispatcher, say
from tests.unit.router.http.test_calls import CHAT, CHAT_PATH, post


@pytest.mark.parametrize("how", ["field", "header"])
def test_background_work_is_refused_where_the_fleet_has_no_room(how: str) -> None:
    dispatcher = FakeDispatcher(say("x"))
    body = CHAT | ({"service_tier": "flex"} if how == "field" else {})
    headers = {} if how == "field" else {"X-Step-Class": "background"}
    assert post(dispatcher, CHAT_PATH, body, headers=headers).status_code == 200
    assert dispatcher.requests[-1].step_class == "background"
    dispatcher.room = 0
    answer = post(dispatcher, CHAT_PATH, body, headers=headers | {"X-Deadline-S": "0.3"})
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "resource_unavailable"
    assert "idle capacity" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) > 0
    assert post(dispatcher, CHAT_PATH, CHAT | {"service_tier": "auto"}).status_code == 200
    assert len(dispatcher.requests) == 2
