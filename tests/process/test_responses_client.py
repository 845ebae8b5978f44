"""Responses over real sockets, by OpenAI's own client."""

import asyncio
import time  # noqa: TID251 - a client's own pause
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from router.http.config import ApiConfig
from tests.process.test_api_http import SOON_S, Cluster, Event
from tests.waiting import wait_until

MODEL = "org/fake"
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(ApiConfig()) as running:
        yield running


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=20, _strict_response_validation=True
    ) as made:
        yield made


def test_a_response_is_made_and_found_again(client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="hi", instructions="be brief", metadata={"a": "b"})
    assert (made.output_text, made.status, made.metadata) == ("héllo 🙂", "completed", {"a": "b"})
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert client.responses.retrieve(made.id) == made
    items = list(client.responses.input_items.list(made.id))
    assert [item.type for item in items] == ["message"]
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_why_less_is_cached(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="hi", instructions="rules")
    options: Any = {"prompt_cache_options": {"comparison_response_id": first.id}}
    same = client.responses.create(model=MODEL, input="hi", instructions="rules", **options)
    assert same.prompt_cache_diagnostics is not None
    assert same.prompt_cache_diagnostics.type == "cache_hit"
    changed = client.responses.create(model=MODEL, input="hi", instructions="other", **options)
    assert changed.prompt_cache_diagnostics is not None
    assert changed.prompt_cache_diagnostics.type == "cache_miss"
    assert changed.prompt_cache_diagnostics.reason == "input_changed"
    options = {"prompt_cache_options": {"comparison_response_id": "resp_none"}}
    unknown = client.responses.create(model=MODEL, input="hi", **options)
    assert unknown.prompt_cache_diagnostics is not None
    assert unknown.prompt_cache_diagnostics.type == "comparison_response_not_found"


def test_a_stream_adds_up(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input="slow", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "one two three"
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "one two three"
    with client.responses.stream(model=MODEL, input="slow") as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_response().output_text == "one two three"
    assert "response.content_part.done" in kinds


def test_calls_are_answered_in_the_next_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="weather", tools=[WEATHER]) as stream:
        list(stream)
        first = stream.get_final_response()
    calls = [item for item in first.output if item.type == "function_call"]
    assert [call.arguments for call in calls] == ['{"city": "Paris"}'] * 2
    assert [call.parsed_arguments for call in calls] == [{"city": "Paris"}] * 2
    results: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "mild"} for call in calls]
    second = client.responses.create(model=MODEL, input=results, previous_response_id=first.id, tools=[WEATHER])
    items = client.responses.input_items.list(second.id, limit=2, order="asc")
    kinds = [item.type for item in items]
    assert kinds == ["message", "message", *["function_call"] * 2, *["function_call_output"] * 2]
    # The same by clients that keep the conversation themselves.
    said: Any = [{"role": "user", "content": "weather"}, *(item.to_dict() for item in first.output), *results]
    third = client.responses.create(model=MODEL, input=said, tools=[WEATHER], store=False)
    assert third.usage is not None
    assert second.usage is not None
    assert third.usage.input_tokens == second.usage.input_tokens


def test_an_answer_in_a_form(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model=MODEL, input="event", text_format=Event)
    assert answer.output_parsed == Event(name="Science Fair", people=["Alice", "Bob"])


def test_what_runs_in_the_background(cluster: Cluster, client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="slow", background=True)
    assert made.status == "queued"
    while made.status in ("queued", "in_progress"):
        time.sleep(0.01)
        made = client.responses.retrieve(made.id)
    assert made.output_text == "one two three"
    long = client.responses.create(model=MODEL, input="forever", background=True)
    wait_until(lambda: cluster.dispatcher.running == 1, SOON_S)
    assert client.responses.cancel(long.id).status == "cancelled"
    assert cluster.dispatcher.running == 0
    assert client.responses.cancel(long.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(client.responses.create(model=MODEL, input="hi").id)


def test_the_errors_are_known(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="other", input="hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as lost:
        client.responses.create(model=MODEL, input="hi", previous_response_id="resp_none")
    assert lost.value.code == "previous_response_not_found"
    with pytest.raises(openai.InternalServerError) as busy:
        client.responses.create(model=MODEL, input="overload", stream=True)
    assert busy.value.status_code == 503


def test_the_async_client_and_one_that_leaves(cluster: Cluster) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=20) as client:
            made = await client.responses.create(model=MODEL, input="hi")
            assert (await client.responses.retrieve(made.id)).output_text == "héllo 🙂"
            counted = await client.responses.input_tokens.count(model=MODEL, input="hi")
            assert made.usage is not None
            assert counted.input_tokens == made.usage.input_tokens
            stream = await client.responses.create(model=MODEL, input="forever", stream=True)
            async for event in stream:
                if event.type == "response.output_text.delta":
                    break
            await stream.close()

    asyncio.run(main())
    wait_until(lambda: cluster.dispatcher.running == 0, SOON_S)


def test_closing_the_server_ends_what_runs_in_the_background() -> None:
    with Cluster(ApiConfig()) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        client.responses.create(model=MODEL, input="forever", background=True)
        wait_until(lambda: running.dispatcher.running == 1, SOON_S)
        running.stop()
        wait_until(lambda: running.dispatcher.running == 0, SOON_S)
