"""Messages over real sockets, by Anthropic's own client."""

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from router.http.config import ApiConfig
from tests.process.test_api_http import SOON_S, Cluster
from tests.waiting import wait_until

MODEL = "org/fake"
WEATHER: Any = {
    "name": "weather",
    "description": "tells the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(ApiConfig()) as running:
        yield running


@pytest.fixture
def client(cluster: Cluster) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=cluster.url, api_key="none", max_retries=0, timeout=20, _strict_response_validation=True
    ) as made:
        yield made


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 500, "messages": [{"role": "user", "content": text}], **fields}


def test_a_message(client: anthropic.Anthropic) -> None:
    system = [{"type": "text", "text": "rules", "cache_control": {"type": "ephemeral"}}]
    answer = client.messages.create(**ask("hi", system=system))
    (block,) = answer.content
    assert block.type == "text"
    assert (block.text, answer.stop_reason, answer.role) == ("héllo 🙂", "end_turn", "assistant")
    assert answer.usage.cache_read_input_tokens
    counted = client.messages.count_tokens(model=MODEL, system="rules", messages=ask("hi")["messages"])
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def test_why_less_is_cached(client: anthropic.Anthropic) -> None:
    first = client.messages.create(**ask("hi", system="rules"), diagnostics={"previous_message_id": None})
    assert first.diagnostics is None
    compared: Any = {"diagnostics": {"previous_message_id": first.id}}
    assert client.messages.create(**ask("hi", system="rules"), **compared).diagnostics is None
    changed = client.messages.create(**ask("hi", system="other"), **compared).diagnostics
    assert changed is not None
    assert changed.cache_miss_reason is not None
    assert changed.cache_miss_reason.type == "system_changed"
    assert changed.cache_miss_reason.cache_missed_input_tokens >= 0
    with client.messages.stream(**ask("hi", system="others"), **compared) as stream:
        told = stream.get_final_message().diagnostics
    assert told is not None
    assert told.cache_miss_reason is not None
    assert told.cache_miss_reason.type == "system_changed"


def test_a_stream_adds_up(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**ask("slow", stop_sequences=["three"])) as stream:
        assert "".join(stream.text_stream) == "one two "
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", "three")
    assert final.usage.output_tokens > 0
    assert final.usage.input_tokens > 0
    events = list(client.messages.create(**ask("slow"), stream=True))
    assert (events[0].type, events[-1].type) == ("message_start", "message_stop")


def test_a_tool_loop(client: anthropic.Anthropic) -> None:
    asked = ask("weather", tools=[WEATHER])
    with client.messages.stream(**asked) as stream:
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    calls = [block for block in first.content if block.type == "tool_use"]
    assert [call.input for call in calls] == [{"city": "Paris"}] * 2
    whole = client.messages.create(**asked)
    assert [block.input for block in whole.content if block.type == "tool_use"] == [{"city": "Paris"}] * 2
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "mild"} for call in calls]
    said: list[Any] = [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = client.messages.create(**asked | {"messages": [*asked["messages"], *said]})
    assert second.usage.input_tokens > first.usage.input_tokens


def test_the_errors_are_known(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**ask("hi") | {"model": "other"})
    assert missing.value.body == {
        "type": "error",
        "error": {
            "type": "not_found_error",
            "message": "the model 'other' does not exist",
            "param": "model",
            "code": "model_not_found",
        },
        "request_id": missing.value.response.headers["x-request-id"],
    }
    with pytest.raises(anthropic.BadRequestError) as wrong:
        client.messages.create(**ask("hi", extra_body={"top_k": -1}))
    assert "top_k" in str(wrong.value)
    with pytest.raises(anthropic.InternalServerError) as busy:
        client.messages.create(**ask("overload"), stream=True)
    assert busy.value.status_code == 503


def test_the_async_client_and_one_that_leaves(cluster: Cluster) -> None:
    async def main() -> None:
        async with anthropic.AsyncAnthropic(base_url=cluster.url, api_key="none", timeout=20) as client:
            answer = await client.messages.create(**ask("hi"))
            assert answer.content[0].type == "text"
            stream = await client.messages.create(**ask("forever"), stream=True)
            async for event in stream:
                if event.type == "content_block_delta":
                    break
            await stream.close()

    asyncio.run(main())
    wait_until(lambda: cluster.dispatcher.running == 0, SOON_S)
