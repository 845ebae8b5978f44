"""Two routers with a bucket and a PostgreSQL in common, and no disk: both serve files, one that lives has batches."""

import asyncio
import hashlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import obstore
import openai
import pytest
from obstore.store import S3Store

from bench.durable.killed import Routers, routers
from kvstore.tiers.objects import parse_url
from router.http.config import ApiConfig
from tests.postgres import postgres
from tests.process.test_api_http import wait_until
from tests.process.test_batch_command import line, results
from tests.process.test_s3_faults import Proxy
from tests.process.test_taking_over import client, sampled
from tracehaul.model.source import resolve

pytestmark = pytest.mark.xdist_group("postgres")

MODEL = resolve().name
LINES, TOKENS = 60, 24
WITHIN_S = 90.0
FILE_BYTES = 200 << 20
MORE_BYTES = 64 << 20


class Between:
    """A proxy before the bucket, on a loop of its own."""

    def __init__(self, port: int) -> None:
        self.proxy = Proxy(port)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True).start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        self._over = asyncio.Event()
        async with self.proxy.listen() as self.port:
            self._ready.set()
            await self._over.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)


class Site:
    """The cluster and its bucket."""

    def __init__(self, cluster: Routers, between: Between, s3: str) -> None:
        self.cluster = cluster
        self.between = between
        self.s3 = s3
        """Of the bucket, past the proxy."""

    def objects(self) -> int:
        return httpx.get(self.s3, trust_env=False).text.count("<Key>")

    def parts(self) -> int:
        """Uploads that are neither whole nor given up."""
        return httpx.get(f"{self.s3}?uploads", trust_env=False).text.count("<UploadId>")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, s3_port: int) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("routers")
    url = "s3://files-of-routers/some/prefix"
    s3 = f"http://127.0.0.1:{s3_port}/{parse_url(url)[0]}"
    httpx.put(s3, trust_env=False, timeout=30.0).raise_for_status()
    between = Between(s3_port)
    said = {"ENDPOINT_URL": f"http://127.0.0.1:{between.port}", "ACCESS_KEY_ID": "tests", "SECRET_ACCESS_KEY": "tests"}
    said = {f"AWS_{name}": value for name, value in {**said, "REGION": "us-east-1"}.items()}
    before = dict(os.environ)
    os.environ.update(said)
    try:
        with (
            postgres() as server,
            routers(folder, 2, server.create("bucket"), api=ApiConfig(files_url=url)) as cluster,
        ):
            asyncio.run(cluster.ready())
            yield Site(cluster, between, s3)
    finally:
        os.environ.clear()
        os.environ.update(before)
        between.close()


def pid(site: Site, at: int) -> int:
    return site.cluster._processes[site.cluster.names[at]].pid


def high_water(site: Site, at: int) -> int:
    """Bytes that the router's process took at most."""
    status = Path(f"/proc/{pid(site, at)}/status").read_text()
    return 1024 * int(next(each.split()[1] for each in status.splitlines() if each.startswith("VmHWM")))


def test_a_long_file_passes_through_without_being_held(site: Site, tmp_path: Path) -> None:
    first, second = client(site.cluster, 0), client(site.cluster, 1)
    path, dice, digest = tmp_path / "long", random.Random(1), hashlib.blake2b()
    with path.open("wb") as file:
        for _ in range(FILE_BYTES >> 20):
            data = dice.randbytes(1 << 20)
            digest.update(data)
            file.write(data)
    first.files.create(file=("warm", b"x" * 100_000), purpose="user_data")
    before = [high_water(site, at) for at in (0, 1)]
    with path.open("rb") as file:
        made = first.files.create(file=("long", file), purpose="user_data", timeout=300.0)
    assert made.bytes == FILE_BYTES
    found = hashlib.blake2b()
    with second.files.with_streaming_response.content(made.id) as content:
        for data in content.iter_bytes():
            found.update(data)
    assert found.digest() == digest.digest(), "the other router tells what this one was given"
    for at in (0, 1):
        assert high_water(site, at) - before[at] < MORE_BYTES, at
    assert {file.id for file in second.files.list()} >= {made.id}
    second.files.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        first.files.retrieve(made.id)
    for file in first.files.list():
        first.files.delete(file.id)
    assert (site.objects(), site.parts()) == (0, 0)


@pytest.mark.parametrize("fault", ["cut", "403", "503"])
def test_an_upload_that_the_bucket_does_not_take_is_refused_and_leaves_nothing(site: Site, fault: str) -> None:
    first = client(site.cluster, 0)
    site.between.proxy.fault = fault
    try:
        with pytest.raises(openai.InternalServerError, match="bucket"):
            first.files.create(file=("lost", bytes(20 << 20)), purpose="user_data")
    finally:
        site.between.proxy.fault = ""
    assert list(first.files.list()) == []
    kept = first.files.create(file=("kept", b"data"), purpose="user_data")
    site.between.proxy.fault = fault
    try:
        with pytest.raises(openai.InternalServerError, match="bucket"):
            first.files.content(kept.id)
        with pytest.raises(openai.InternalServerError, match="cannot be deleted"):
            first.files.delete(kept.id)
        assert first.files.retrieve(kept.id) == kept
    finally:
        site.between.proxy.fault = ""
    assert first.files.content(kept.id).content == b"data"
    first.files.delete(kept.id)
    assert (site.objects(), site.parts()) == (0, 0)


@pytest.mark.parametrize("nbytes", [1 << 20, 9 << 20])
def test_a_damaged_object_is_never_told_as_whole(site: Site, nbytes: int) -> None:
    first = client(site.cluster, 0)
    made = first.files.create(file=("long", bytes(nbytes)), purpose="user_data")
    listed = httpx.get(site.s3, trust_env=False).text
    key = listed.partition("<Key>")[2].partition("</Key>")[0]
    assert made.id in key
    bucket = S3Store(site.s3.rpartition("/")[2], client_options={"allow_http": True})
    obstore.put(bucket, key, bytes(nbytes - 1) + b"x")
    with pytest.raises((openai.InternalServerError, openai.APIConnectionError, httpx.RemoteProtocolError)) as said:
        first.files.content(made.id)
    assert nbytes > 4 << 20 or "damaged" in str(said.value)
    obstore.delete(bucket, key)
    with pytest.raises(openai.InternalServerError, match="missing"):
        first.files.content(made.id)
    first.files.delete(made.id)
    assert list(first.files.list()) == []


def ordered(router: openai.OpenAI, count: int = LINES) -> tuple[str, str]:
    """File and batch."""
    more = {"max_tokens": TOKENS, "ignore_eos": True}
    lines = b"".join(line(f"c{at}", f"Say {at}.", model=MODEL, **more) for at in range(count))
    file = router.files.create(file=("calls.jsonl", lines), purpose="batch")
    batch = router.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    return file.id, batch.id


def has(router: openai.OpenAI, batch: str, share: float) -> bool:
    counts = router.batches.retrieve(batch).request_counts
    return counts is not None and counts.completed > share * LINES


def outcome(router: openai.OpenAI, batch: str, folder: Path) -> set[str]:
    """Lines that were answered, each told of once."""
    wait_until(lambda: router.batches.retrieve(batch).status == "completed", WITHIN_S)
    whole = router.batches.retrieve(batch)
    assert whole.output_file_id is not None
    assert whole.error_file_id is None
    path = folder / batch
    path.write_bytes(router.files.content(whole.output_file_id).content)
    return set(results(path))


@pytest.mark.parametrize("fault", ["freeze", "403"])
def test_a_batch_waits_for_its_bucket_and_goes_on(site: Site, fault: str, tmp_path: Path) -> None:
    first = client(site.cluster, 0)
    _, batch = ordered(first)
    wait_until(lambda: has(first, batch, 0.1), WITHIN_S)
    site.between.proxy.fault = fault
    try:
        threading.Event().wait(5.0)
        assert first.batches.retrieve(batch).status == "in_progress"
    finally:
        site.between.proxy.fault = ""
        site.between.proxy.cut()
    assert outcome(first, batch, tmp_path) == {f"c{at}" for at in range(LINES)}


def test_a_killed_router_goes_on_with_what_was_answered(site: Site, tmp_path: Path) -> None:
    first, before = client(site.cluster, 0), sampled(site.cluster)
    _, batch = ordered(first)
    wait_until(lambda: has(first, batch, 0.3), WITHIN_S)
    site.cluster.kill(site.cluster.names[0])
    site.cluster.start(site.cluster.names[0])
    asyncio.run(site.cluster.known())
    either = [first, client(site.cluster, 1)]  # one that starts within ten seconds has it still
    wait_until(lambda: any(lists(router, batch) for router in either), WITHIN_S)
    owner = next(router for router in either if lists(router, batch))
    assert outcome(owner, batch, tmp_path) == {f"c{at}" for at in range(LINES)}
    assert sampled(site.cluster) - before <= 1.05 * LINES * TOKENS, "what had ended is not computed again"


def test_another_router_goes_on_with_what_one_left_and_who_thaws_changes_nothing(site: Site, tmp_path: Path) -> None:
    first, second = client(site.cluster, 0), client(site.cluster, 1)
    file, batch = ordered(first)
    wait_until(lambda: has(first, batch, 0.2), WITHIN_S)
    assert second.batches.retrieve(batch).id == batch
    os.kill(pid(site, 0), signal.SIGSTOP)
    try:
        wait_until(lambda: lists(second, batch), WITHIN_S)
    finally:
        os.kill(pid(site, 0), signal.SIGCONT)
    assert outcome(second, batch, tmp_path) == {f"c{at}" for at in range(LINES)}
    wait_until(lambda: first.batches.retrieve(batch).status == "completed", WITHIN_S)
    assert first.files.content(file).content == second.files.content(file).content
    output = second.batches.retrieve(batch).output_file_id
    assert set(results_of(first, output, tmp_path)) == {f"c{at}" for at in range(LINES)}


def lists(router: openai.OpenAI, batch: str) -> bool:
    """Whether it does; while another router is believed to live, and does not answer, it lists nothing."""
    try:
        return any(each.id == batch for each in router.batches.list())
    except openai.InternalServerError:
        return False


def results_of(router: openai.OpenAI, file: str | None, folder: Path) -> dict[str, object]:
    assert file is not None
    path = folder / "again"
    path.write_bytes(router.files.content(file).content)
    return dict(results(path))


def test_a_killed_router_s_batch_is_another_s(site: Site, tmp_path: Path) -> None:
    first, second = client(site.cluster, 0), client(site.cluster, 1)
    file, batch = ordered(first)
    wait_until(lambda: has(first, batch, 0.3), WITHIN_S)
    site.cluster.kill(site.cluster.names[0])
    wait_until(lambda: lists(second, batch), WITHIN_S)
    assert outcome(second, batch, tmp_path) == {f"c{at}" for at in range(LINES)}
    assert second.files.retrieve(file).bytes > 0
    erased = httpx.delete(f"{site.cluster.urls[1]}/v1/data", trust_env=False, timeout=60.0)
    assert erased.json()["files"] >= 2, erased.text
    left = httpx.get(site.s3, trust_env=False).text
    assert (site.objects(), site.parts()) == (0, 0), left
