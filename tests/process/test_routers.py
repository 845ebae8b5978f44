"""Two routers over one PostgreSQL and one folder: each serves what any of them keeps, and one that stands still for so
long that the other takes it for dead does not go on as if it were not."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from bench.durable.killed import Routers, routers
from cluster.webhooks.config import WebhookConfig
from router.http.config import ApiConfig
from tests.postgres import postgres
from tests.process.test_batch_command import line
from tests.receiver import Receiver
from tests.waiting import wait_until
from tracehaul.model.source import resolve

pytestmark = [pytest.mark.xdist_group("postgres"), pytest.mark.timeout(300)]

MODEL = resolve().name
WITHIN_S = 60.0


class Router:
    """What a client asks of one."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, trust_env=False, timeout=60.0)

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        return self._http.request(method, path, **more)

    def get(self, path: str) -> dict[str, Any]:
        return self.ask("GET", path).raise_for_status().json()

    def found(self, path: str, **fields: Any) -> bool:
        """It is there, and so."""
        answer = self.ask("GET", path)
        assert answer.status_code in (200, 404, 503), answer.text
        return answer.status_code == 200 and fields.items() <= answer.json().items()

    def deleted(self, path: str) -> bool:
        """It is, at all routers; 404: here it was already, when another could not be told."""
        answer = self.ask("DELETE", path)
        assert answer.status_code in (200, 404, 503), answer.text
        return answer.status_code != 503

    def response(self, text: str, tokens: int) -> str:
        body = {"model": MODEL, "input": text, "background": True, "max_output_tokens": tokens, "ignore_eos": True}
        return self.ask("POST", "/v1/responses", json=body).raise_for_status().json()["id"]

    def step(self, trace: str, text: str = "Hello.") -> bool:
        """False: it knows no worker, as it stood still."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 4}
        headers = {"x-trace-id": trace}
        answer = self.ask("POST", "/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code in (200, 503), answer.text
        return answer.status_code == 200

    def batch(self, count: int, tokens: int) -> str:
        more: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True}
        lines = b"".join(line(f"c{at}", f"Say {at}.", model=MODEL, **more) for at in range(count))
        form = {"data": {"purpose": "batch"}, "files": {"file": ("calls.jsonl", lines)}}
        file = self.ask("POST", "/v1/files", **form).raise_for_status().json()["id"]
        asked = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        return self.ask("POST", "/v1/batches", json=asked).raise_for_status().json()["id"]


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Routers]:
    folder = tmp_path_factory.mktemp("routers")
    more = {
        "api": ApiConfig(files_dir=str(folder / "shared")),
        "webhooks": (WebhookConfig(receiver.url, networks=("127.0.0.0/8",)),),
    }
    with postgres() as server, routers(folder, 2, server.create("routers"), **more) as cluster:
        asyncio.run(cluster.ready())
        yield cluster


@pytest.fixture
def pair(cluster: Routers, receiver: Receiver) -> list[Router]:
    receiver.does = "take"
    pair = [Router(url) for url in cluster.urls]
    for router in pair:  # each knows of the other again
        wait_until(lambda router=router: router.ask("GET", "/v1/batches").status_code == 200, WITHIN_S)
    return pair


def test_each_serves_what_any_of_them_keeps(pair: list[Router]) -> None:
    one, two = pair
    assert one.step("gone")
    name = one.batch(40, 60)
    wait_until(lambda: one.found(f"/v1/batches/{name}", status="in_progress"), WITHIN_S)
    wait_until(lambda: two.found(f"/v1/batches/{name}", status="in_progress"), WITHIN_S)
    assert name in [each["id"] for each in two.get("/v1/batches")["data"]]
    assert two.ask("POST", f"/v1/batches/{name}/cancel").json()["status"] in ("cancelling", "cancelled")
    wait_until(lambda: two.found(f"/v1/batches/{name}", status="cancelled"), WITHIN_S)
    error = two.get(f"/v1/batches/{name}")["error_file_id"]
    assert b"batch_cancelled" in two.ask("GET", f"/v1/files/{error}/content").content
    kept = [two.response("Go on.", 4), one.response("Go on.", 4)]
    for response in kept:
        wait_until(lambda response=response: one.found(f"/v1/responses/{response}", status="incomplete"), WITHIN_S)
    assert two.ask("DELETE", "/v1/traces/gone").status_code == 200
    assert one.ask("GET", "/v1/traces/gone").status_code == 404
    gone = two.ask("DELETE", "/v1/data").raise_for_status().json()
    assert (gone["batches"], gone["responses"]) == (1, 2)
    for router in pair:
        assert router.get("/v1/batches")["data"] == router.get("/v1/files")["data"] == []
        assert router.get("/v1/traces")["data"] == []
        assert not any(router.found(f"/v1/responses/{response}") for response in kept)


def test_who_stood_still_does_not_go_on_with_what_another_has_by_now(
    cluster: Routers, pair: list[Router], receiver: Receiver
) -> None:
    one, two = pair
    receiver.does = "refuse"
    assert one.step("kept")
    assert one.step("gone")
    told = one.response("Hello.", 4)
    wait_until(lambda: told in receiver.tried, WITHIN_S)
    batch = one.batch(60, 24)
    wait_until(lambda: one.found(f"/v1/batches/{batch}", status="in_progress"), WITHIN_S)
    runs = one.response("Go on.", 600)
    wait_until(lambda: one.found(f"/v1/responses/{runs}", status="in_progress"), WITHIN_S)
    wait_until(lambda: bool(httpx.get(f"{cluster.urls[0]}/v1/traces", trust_env=False).json()["data"]), WITHIN_S)

    cluster.freeze(cluster.names[0])
    try:
        assert two.ask("DELETE", "/v1/traces/gone").status_code == 503, "it may serve it again, for all that is known"
        assert two.step("kept", "And then?")
        receiver.does = "take"
        wait_until(lambda: two.deleted("/v1/traces/gone"), WITHIN_S)
        wait_until(lambda: told in receiver.taken, WITHIN_S)
        wait_until(lambda: two.found(f"/v1/responses/{runs}", status="incomplete"), WITHIN_S)
        assert two.ask("GET", f"/v1/batches/{batch}").status_code == 503, "it has its batches still"
    finally:
        cluster.freeze(cluster.names[0], frozen=False)

    assert one.ask("GET", "/v1/traces/gone").status_code == 404
    assert one.get("/v1/traces/kept")["steps_count"] == 2
    wait_until(lambda: two.found(f"/v1/batches/{batch}", status="completed"), WITHIN_S)
    answers = two.ask("GET", f"/v1/files/{two.get(f'/v1/batches/{batch}')['output_file_id']}/content").content
    names = [json.loads(each)["custom_id"] for each in answers.splitlines()]
    assert sorted(names) == sorted(f"c{at}" for at in range(60)), "each once"
    text = two.get(f"/v1/responses/{runs}")["output"]
    wait_until(lambda: one.found(f"/v1/responses/{runs}", output=text), WITHIN_S)
    wait_until(lambda: runs in receiver.taken, WITHIN_S)
    wait_until(lambda: one.step("kept", "And now?"), WITHIN_S)
    last = one.response("Bye.", 4)
    wait_until(lambda: last in receiver.taken, WITHIN_S)
    assert receiver.taken.count(told) == 1, "it is the other one's"
    assert "gone" not in [each["id"] for each in one.get("/v1/traces")["data"]]


def test_what_a_router_had_to_tell_that_died_another_tells(
    cluster: Routers, pair: list[Router], receiver: Receiver
) -> None:
    one, two = pair
    receiver.does = "refuse"
    told = one.response("Hello.", 4)
    wait_until(lambda: told in receiver.tried, WITHIN_S)
    cluster.kill(cluster.names[0])
    receiver.does = "take"
    wait_until(lambda: told in receiver.taken, WITHIN_S)
    wait_until(lambda: two.deleted("/v1/data"), WITHIN_S)
    cluster.start(cluster.names[0])
    asyncio.run(cluster.known())
    last = one.response("Bye.", 4)
    wait_until(lambda: last in receiver.taken, WITHIN_S)
    assert receiver.taken.count(told) == 1
    assert not one.found(f"/v1/responses/{told}"), "it was erased while it was gone"
