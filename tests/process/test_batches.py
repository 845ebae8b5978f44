"""``/v1/batches`` on a real server of fake engines, by OpenAI's client: killed as it runs, each line ends just once."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from tests.process.test_batch_command import line, results
from tests.receiver import Receiver
from tests.waiting import wait_until

HERE = Path(__file__).parent
LINES = 150
OVER = ("completed", "failed", "expired", "cancelled")


class Server:
    """One that can be killed, and started again over what it kept."""

    def __init__(self, folder: Path, **more: str) -> None:
        """``more``: of its environment."""
        self.asked = folder / "asked"
        self.folder = folder
        self.receiver = Receiver()
        self._secret = folder / "kept" / "webhooks" / "secret"
        self._environment = os.environ | {
            "ASKED": str(self.asked),
            "KEPT": str(folder / "kept"),
            "RECEIVER": self.receiver.url,
            "PYTHONPATH": str(HERE.parents[1]),
            **more,
        }
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(HERE / "batch_server.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=self._environment, **pipes)
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        self.client = openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0)

    def told(self) -> list[Any]:
        """Events that the receiver took, each proven and read by OpenAI's client."""
        secret = self._secret.read_text().strip()
        return [self.client.webhooks.unwrap(*told, secret=secret) for told in self.receiver.told]

    def on_their_way(self) -> list[bytes]:
        """Events, as the server keeps them until somebody took them."""
        with closing(sqlite3.connect(self.folder / "kept" / "records" / "router-0.sqlite")) as database:
            rows = database.execute("SELECT body FROM documents WHERE kind LIKE 'webhook/%' AND body != x''").fetchall()
        return [body for (body,) in rows]

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def batch(self, *lines: bytes, window: str = "24h", **options: Any) -> Batch:
        file = self.client.files.create(file=("calls.jsonl", b"".join(lines)), purpose="batch")
        endpoint = options.pop("endpoint", "/v1/chat/completions")
        return self.client.batches.create(
            input_file_id=file.id,
            endpoint=endpoint,
            completion_window=window,  # type: ignore[arg-type]
            **options,
        )

    def over(self, batch: Batch) -> Batch:
        found = [batch]

        def look() -> bool:
            found.append(self.client.batches.retrieve(batch.id))
            return found[-1].status in OVER

        wait_until(look)
        return found[-1]

    def result(self, file: str | None, folder: Path) -> dict[str, dict[str, Any]]:
        assert file is not None
        path = folder / file
        path.write_bytes(self.client.files.content(file).content)
        return results(path)


@pytest.fixture(scope="module", params=["folder", "bucket"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    more: dict[str, str] = {}
    if request.param == "bucket":
        endpoint = f"http://127.0.0.1:{request.getfixturevalue('s3_port')}"
        httpx.put(f"{endpoint}/batches-of-one", trust_env=False, timeout=30.0).raise_for_status()
        said = {"ENDPOINT_URL": endpoint, "REGION": "us-east-1", "ACCESS_KEY_ID": "tests", "SECRET_ACCESS_KEY": "tests"}
        more = {"FILES_URL": "s3://batches-of-one", **{f"AWS_{name}": value for name, value in said.items()}}
    server = Server(tmp_path_factory.mktemp("batches"), **more)
    yield server
    server.kill()
    server.receiver.close()


def test_each_line_ends_once_however_often_the_router_is_killed(server: Server, tmp_path: Path) -> None:
    batch = server.batch(
        *(line(f"c{at}", f"{'poison' if at == 7 else 'killed'} {at} of it") for at in range(LINES)),
        metadata={"for": "tests"},
    )
    assert (batch.status, batch.metadata) == ("validating", {"for": "tests"})
    server.client.files.delete(batch.input_file_id)
    for share in (0.2, 0.6):
        wait_until(lambda share=share: ended(server.client.batches.retrieve(batch.id)) >= share * LINES)
        server.kill()
        server.start()
    done = server.over(batch)
    assert done.status == "completed", done
    assert done.request_counts is not None
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (LINES, LINES - 1, 1)
    answered, failed = server.result(done.output_file_id, tmp_path), server.result(done.error_file_id, tmp_path)
    assert answered.keys() == {f"c{at}" for at in range(LINES)} - {"c7"}
    assert failed["c7"]["response"]["status_code"] == 500
    assert answered["c1"]["response"]["body"]["choices"][0]["message"]["content"] == "héllo 🙂"
    told = Counter(each for each in server.asked.read_text().splitlines() if "killed" in each)
    assert told.total() <= LINES + 2 * 4, "what had ended was not asked again"
    assert {each.split()[0] for each in told} == {"background"}
    output = server.client.files.retrieve(done.output_file_id or "")
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")


def ended(batch: Batch) -> int:
    assert batch.request_counts is not None
    return batch.request_counts.completed + batch.request_counts.failed


def test_wrong_lines_fail_the_batch_and_are_named(server: Server) -> None:
    batch = server.over(server.batch(line("a", "x"), b"{\n", line("c", "x", "/v1/completions")))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [(error.line, error.code) for error in batch.errors.data or []] == [
        (2, "invalid_json_line"),
        (3, "url_mismatch"),
    ]
    assert batch.output_file_id is None


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/responses"])
def test_other_endpoints(server: Server, tmp_path: Path, endpoint: str) -> None:
    batch = server.over(server.batch(line("a", "hello", endpoint), endpoint=endpoint))
    assert batch.status == "completed"
    assert server.result(batch.output_file_id, tmp_path)["a"]["response"]["status_code"] == 200
    assert batch.error_file_id is None


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"window": "1s"}, "completion_window"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
    ],
)
def test_what_is_no_batch_is_refused(server: Server, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.batch(line("a", "x"), **options)
    assert refused.value.param is not None
    assert refused.value.param.startswith(param)


def test_inputs_are_files_of_that_purpose(server: Server) -> None:
    create: Callable[..., Batch] = server.client.batches.create
    rest = {"endpoint": "/v1/completions", "completion_window": "24h"}
    with pytest.raises(openai.NotFoundError):
        create(input_file_id="file-unknown", **rest)
    other = server.client.files.create(file=("a", b"x"), purpose="user_data")
    with pytest.raises(openai.BadRequestError):
        create(input_file_id=other.id, **rest)


def test_a_cancelled_batch_delivers_what_there_is(server: Server, tmp_path: Path) -> None:
    batch = server.batch(*(line(f"c{at}", f"cancelled {at}") for at in range(LINES)))
    wait_until(lambda: ended(server.client.batches.retrieve(batch.id)) >= 5)
    cancelling = server.client.batches.cancel(batch.id)
    assert cancelling.status in ("cancelling", "cancelled")
    done = server.over(batch)
    assert done.status == "cancelled"
    answered, failed = server.result(done.output_file_id, tmp_path), server.result(done.error_file_id, tmp_path)
    assert len(answered) >= 5
    assert answered.keys() | failed.keys() == {f"c{at}" for at in range(LINES)}
    assert not answered.keys() & failed.keys()
    assert {each["error"]["code"] for each in failed.values()} == {"batch_cancelled"}
    assert server.client.batches.cancel(batch.id).status == "cancelled"


def test_lists_are_of_the_newest_first(server: Server) -> None:
    made = [server.batch(line("a", "x")) for _ in range(3)]
    found = [batch.id for batch in server.client.batches.list(limit=2)]
    assert found[:3] == [batch.id for batch in reversed(made)]
    for batch in made:
        assert server.over(batch).status == "completed"


def test_an_end_is_told_though_the_router_is_killed_while_it_tells(server: Server) -> None:
    server.receiver.does = "nothing"
    batch = server.batch(line("t", "told of it"))
    assert server.over(batch).status == "completed"
    body: dict[str, Any] = {"model": "org/fake", "input": "in the background", "background": True}
    response = server.client.responses.create(**body)
    wait_until(lambda: server.client.responses.retrieve(response.id).status == "completed")
    wait_until(lambda: database_has(server, "response.completed"))
    server.kill()
    server.receiver.does = "take"
    server.start()
    wait_until(lambda: {batch.id, response.id} <= {event.data.id for event in server.told()})
    kinds = {event.data.id: event.type for event in server.told()}
    assert (kinds[batch.id], kinds[response.id]) == ("batch.completed", "response.completed")


def database_has(server: Server, kind: str) -> bool:
    """An event of that kind waits to be told."""
    return any(kind.encode() in body for body in server.on_their_way())


def test_the_end_of_each_batch_was_told(server: Server) -> None:
    """Of all that there are, of which these make sure that some are there."""
    assert server.over(server.batch(line("a", "x"))).status == "completed"
    assert server.over(server.batch(b"{\n")).status == "failed"
    running = server.batch(*(line(f"c{at}", f"cancelled {at}") for at in range(LINES)))
    server.client.batches.cancel(running.id)
    assert server.over(running).status == "cancelled"
    batches = [batch for batch in server.client.batches.list(limit=100) if batch.status in OVER]
    expected = {(f"batch.{batch.status}", batch.id) for batch in batches}
    missing = set(expected)

    def all_told() -> bool:
        missing.difference_update((event.type, event.data.id) for event in server.told())
        return not missing

    try:
        wait_until(all_told, 120.0)
    except AssertionError:
        pytest.fail(f"never told: {missing}; {server.on_their_way()}")
    names = {(event.type, event.data.id): event.id for event in server.told()}
    assert {event.id for event in server.told()} == set(names.values()), (
        "of each end one name, however often it is told"
    )
