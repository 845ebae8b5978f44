"""A router that is killed and does not come back: the other one goes on with its batches, files and responses."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from bench.durable.killed import Routers, routers
from router.http.config import ApiConfig
from tests.postgres import postgres
from tests.process.test_batch_command import line, results
from tests.waiting import wait_until
from tracehaul.model.source import resolve

pytestmark = pytest.mark.xdist_group("postgres")

MODEL = resolve().name
LINES, TOKENS = 60, 24
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routers]:
    folder = tmp_path_factory.mktemp("routers")
    api = ApiConfig(files_dir=str(folder / "shared"))
    with postgres() as server, routers(folder, 2, server.create("over"), api=api) as cluster:
        asyncio.run(cluster.ready())
        yield cluster


def client(cluster: Routers, at: int) -> openai.OpenAI:
    return openai.OpenAI(api_key="none", base_url=f"{cluster.urls[at]}/v1", max_retries=5, timeout=60.0)


def over(router: openai.OpenAI, response: str) -> bool:
    found = router.responses.retrieve(response)
    assert found.status in ("queued", "in_progress", "completed", "incomplete"), found.error
    return found.status in ("completed", "incomplete")


def sampled(cluster: Routers) -> int:
    return asyncio.run(cluster.sampled())


def test_another_router_goes_on_with_what_one_left(cluster: Routers, tmp_path: Path) -> None:
    first, second = client(cluster, 0), client(cluster, 1)
    before = sampled(cluster)
    more = {"max_tokens": TOKENS, "ignore_eos": True}
    lines = b"".join(line(f"c{at}", f"Say {at}.", model=MODEL, **more) for at in range(LINES))
    file = first.files.create(file=("calls.jsonl", lines), purpose="batch")
    batch = first.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    ended = first.responses.create(model=MODEL, input="Hello.", background=True, max_output_tokens=4)
    wait_until(lambda: over(first, ended.id), WITHIN_S)
    runs = first.responses.create(model=MODEL, input="Go on.", background=True, max_output_tokens=400)

    def half() -> bool:
        counts = first.batches.retrieve(batch.id).request_counts
        return counts is not None and counts.completed > LINES // 4

    wait_until(half, WITHIN_S)
    text = first.responses.retrieve(ended.id).output_text
    assert second.batches.retrieve(batch.id).status == "in_progress"

    cluster.kill(cluster.names[0])

    wait_until(lambda: any(each.id == batch.id for each in second.batches.list()), WITHIN_S)
    wait_until(lambda: second.batches.retrieve(batch.id).status == "completed", WITHIN_S)
    whole = second.batches.retrieve(batch.id)
    assert whole.output_file_id is not None
    assert whole.error_file_id is None
    path = tmp_path / "answers"
    path.write_bytes(second.files.content(whole.output_file_id).content)
    assert set(results(path)) == {f"c{at}" for at in range(LINES)}, "each once"
    assert second.files.content(file.id).content == lines
    assert second.responses.retrieve(ended.id).output_text == text
    wait_until(lambda: over(second, runs.id), WITHIN_S)
    used = [second.responses.retrieve(each.id).usage for each in (ended, runs)]
    answered = LINES * TOKENS + sum(usage.output_tokens for usage in used if usage is not None)
    again = sampled(cluster) - before - answered
    assert again <= 0.02 * answered, "its workers knew what they had said to it"

    cluster.start(cluster.names[0])
    asyncio.run(cluster.known())
    for router in (first, second):
        assert router.batches.retrieve(batch.id).output_file_id == whole.output_file_id
        assert [each.id for each in router.batches.list()] == [batch.id]
