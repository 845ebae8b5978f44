"""``/v1/files``, by OpenAI's own client and by raw forms: kept, listed, fetched, deleted; whole or not at all."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.files import File, FileLimits
from jobs.folder.files import FolderFiles
from router.calls.errors import CallFailed
from router.calls.fakes import FakeDispatcher, FakeText, say
from router.http import files as pages
from router.http.app import create_app
from router.http.config import ApiConfig
from router.http.jobs import Jobs
from router.http.keys import Key, Keyring, hashed
from router.http.multipart import Form
from tests.folder_jobs import folder_batches
from tracehaul.runtime.offload import InlineOffload

SECRETS = {"acme": f"th-0123abcd-{'s' * 43}", "other": f"th-4567abcd-{'t' * 43}"}
Use = Callable[[httpx.AsyncClient], Awaitable[None]]


def served(folder: Path, use: Use, *, keyed: bool = False, limits: FileLimits | None = None) -> None:
    keys = [Key(secret[3:11], hashed(secret), tenant=tenant) for tenant, secret in SECRETS.items()]

    async def main() -> None:
        offload = InlineOffload()
        files = FolderFiles(folder, limits or FileLimits(), offload)
        try:
            app = create_app(
                FakeDispatcher(say("hi")),
                {"org/fake": FakeText()},
                lambda: b"",
                ApiConfig(file_bytes_max=files.limits.file_bytes_max),
                offload,
                keyring=Keyring(keys) if keyed else None,
                jobs=Jobs(files, folder_batches(folder.with_name(f"{folder.name}-batches"), files, offload, 10)),
            )
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test/v1") as http:
                await use(http)
        finally:
            files.close()

    asyncio.run(main())


def client(http: httpx.AsyncClient, tenant: str = "acme") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key=SECRETS[tenant], base_url="http://test/v1", http_client=http, max_retries=0)


def kept(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


def test_a_file_s_life(tmp_path: Path) -> None:
    data = os.urandom(700_000)

    async def use(http: httpx.AsyncClient) -> None:
        files = client(http).files
        made = await files.create(file=("calls.jsonl", data), purpose="batch")
        assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(data), "calls.jsonl", "batch")
        assert made.expires_at == made.created_at + 30 * 86_400
        assert await files.retrieve(made.id) == made
        assert (await files.content(made.id)).content == data
        assert kept(tmp_path) == [".bytes", ".json"]
        assert (await files.delete(made.id)).deleted
        assert kept(tmp_path) == []
        for gone in (files.retrieve(made.id), files.content(made.id), files.delete(made.id)):
            with pytest.raises(openai.NotFoundError):
                await gone

    served(tmp_path, use)


def test_files_outlive_the_process_and_what_it_left_half_does_not(tmp_path: Path) -> None:
    names: list[str] = []

    async def make(http: httpx.AsyncClient) -> None:
        made = await client(http).files.create(file=("a", b"one"), purpose="user_data")
        names.append(made.id)

    async def look(http: httpx.AsyncClient) -> None:
        files = client(http).files
        assert [file.id async for file in await files.list()] == names
        assert (await files.content(names[0])).content == b"one"

    served(tmp_path, make)
    for name in ("file-x.part", "file-y.bytes", "file-z.json.12.tmp"):
        (tmp_path / name).write_bytes(b"half")
    served(tmp_path, look)
    assert kept(tmp_path) == [".bytes", ".json"]


def test_lists_go_page_by_page(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        files = client(http).files
        made = [await files.create(file=(str(at), b"x"), purpose="user_data") for at in range(5)]
        made.append(await files.create(file=("b", b"x"), purpose="batch"))
        newest = [file.id for file in reversed(made)]
        assert [file.id async for file in await files.list(limit=2)] == newest
        assert [file.id async for file in await files.list(limit=4, order="asc")] == newest[::-1]
        assert [file.id async for file in await files.list(purpose="batch")] == newest[:1]
        page = await files.list(limit=2, after=newest[1])
        assert ([file.id for file in page.data], page.has_more) == (newest[2:4], True)
        for wrong in ({"limit": 0}, {"limit": 10_001}, {"after": "file-unknown"}):
            with pytest.raises(openai.BadRequestError):
                await files.list(**wrong)

    served(tmp_path, use)


def test_a_tenant_sees_its_own(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        acme, other = client(http).files, client(http, "other").files
        made = await acme.create(file=("a", b"secret"), purpose="batch")
        assert [file.id async for file in await other.list()] == []
        for hidden in (other.retrieve(made.id), other.content(made.id), other.delete(made.id)):
            with pytest.raises(openai.NotFoundError):
                await hidden
        assert (await acme.content(made.id)).content == b"secret"
        nobody = openai.AsyncOpenAI(api_key="th-no", base_url="http://test/v1", http_client=http, max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            await nobody.files.list()

    served(tmp_path, use, keyed=True)


def test_a_file_s_time_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        files = client(http).files
        made = await files.create(
            file=("a", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert made.expires_at == made.created_at + 3600
        for wrong in ({"anchor": "created_at", "seconds": 60}, {"anchor": "now", "seconds": 3600}):
            with pytest.raises(openai.BadRequestError):
                await files.create(file=("a", b"x"), purpose="user_data", expires_after=wrong)  # type: ignore[arg-type]
        monkeypatch.setattr(pages, "wall_s", lambda: made.created_at + 3600.0)
        with pytest.raises(openai.NotFoundError):
            await files.retrieve(made.id)
        assert (await files.list()).data == []

    served(tmp_path, use)


def test_time_that_is_over_frees_the_disk(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        await client(http).files.create(file=("a", b"x"), purpose="batch")
        await client(http).files.create(file=("b", b"x"), purpose="user_data")

    served(tmp_path, use)

    async def main() -> None:
        files = FolderFiles(tmp_path, FileLimits(), InlineOffload())
        await files.sweep(2**40)
        files.close()

    asyncio.run(main())
    assert kept(tmp_path) == [".bytes", ".json"]


def form(*parts: bytes, end: bytes = b"--xx--\r\n") -> dict[str, Any]:
    content = b"".join(b"--xx\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + end
    return {"content": content, "headers": {"content-type": "multipart/form-data; boundary=xx"}}


FILE = b'name="file"; filename="a"\r\n\r\ndata'
PURPOSE = b'name="purpose"\r\n\r\nbatch'


@pytest.mark.parametrize(
    ("sent", "status", "param"),
    [
        (form(PURPOSE, FILE), 200, None),
        (form(FILE, PURPOSE), 200, None),
        (form(PURPOSE), 400, "file"),
        (form(FILE), 400, "purpose"),
        (form(FILE, b'name="purpose"\r\n\r\nbatch_output'), 400, "purpose"),
        (form(FILE, FILE, PURPOSE), 400, "file"),
        (form(FILE, PURPOSE, end=b""), 400, None),
        (form(PURPOSE, FILE, b'name="x"\r\n\r\n' + b"x" * 5000), 413, None),
        (form(*[b'name="%d"\r\n\r\nx' % at for at in range(100)]), 413, None),
        ({"content": b"garbage", "headers": {"content-type": "multipart/form-data; boundary=xx"}}, 400, None),
        ({"content": b"{}", "headers": {"content-type": "application/json"}}, 415, None),
        ({"content": b"{}", "headers": {"content-type": "multipart/form-data"}}, 415, None),
        (form(PURPOSE, b'name="file"; filename="a"\r\n\r\n' + b"x" * 1001), 413, "file"),
        (form(PURPOSE, b'name="file"; filename="a"\r\n\r\n' + b"x" * 100_000), 413, "file"),
    ],
)
def test_what_is_no_upload_leaves_nothing(tmp_path: Path, sent: dict[str, Any], status: int, param: str | None) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        answer = await http.post("/files", **sent)
        assert answer.status_code == status, answer.text
        if status != 200:
            assert answer.json()["error"]["param"] == param

    served(tmp_path, use, limits=FileLimits(file_bytes_max=1000))
    assert kept(tmp_path) == ([".bytes", ".json"] if status == 200 else [])


def test_limits_of_a_tenant(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient) -> None:
        files = client(http).files
        await files.create(file=("a", b"x" * 60), purpose="batch")
        with pytest.raises(openai.APIStatusError, match="bytes"):
            await files.create(file=("a", b"x" * 60), purpose="batch")
        await files.create(file=("a", b"x" * 4), purpose="batch")
        with pytest.raises(openai.InternalServerError, match="delete some"):
            await files.create(file=("a", b"x"), purpose="batch")

    served(tmp_path, use, limits=FileLimits(tenant_bytes_max=100, files_max=2))


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, full = os.write, 0

    def some(handle: int, data: bytes) -> int:
        nonlocal full
        if len(data) > 100:
            return write(handle, data[:100])
        full += 1
        raise OSError(28, "No space left on device")

    async def use(http: httpx.AsyncClient) -> None:
        with monkeypatch.context() as disk:
            disk.setattr(os, "write", some)
            answer = await http.post("/files", data={"purpose": "batch"}, files={"file": ("a", b"x" * 150)})
        assert answer.status_code == 503
        assert "No space left on device" in answer.json()["error"]["message"]
        assert kept(tmp_path) == []
        assert full == 1
        answer = await http.post("/files", data={"purpose": "batch"}, files={"file": ("a", b"x" * 150)})
        assert answer.status_code == 200

    served(tmp_path, use)


def test_the_folder_is_one_process_s(tmp_path: Path) -> None:
    first = FolderFiles(tmp_path, FileLimits(), InlineOffload())
    with pytest.raises(OSError):
        FolderFiles(tmp_path, FileLimits(), InlineOffload())
    first.close()
    FolderFiles(tmp_path, FileLimits(), InlineOffload()).close()


@settings(max_examples=50)
@given(st.binary(max_size=60), st.integers(1, 30))
def test_a_form_cut_anywhere_is_the_same(data: bytes, size: int) -> None:
    sent = form(PURPOSE, b'name="file"; filename="\xc3\xa9"\r\n\r\n' + data)["content"]
    found = Form(b"multipart/form-data; boundary=xx", "file")
    try:
        pieces = [piece for at in range(0, len(sent), size) for piece in found.feed(sent[at : at + size])]
    except CallFailed:
        assert b"--xx" in data
        return
    if b"--xx" not in data:
        assert b"".join(pieces) == data
        assert (found.fields, found.filename, found.ended) == ({"purpose": "batch"}, "é", True)


def test_a_form_of_nothing_but_fields_is_refused(tmp_path: Path) -> None:
    parts = b"".join(b'--x\r\ncontent-disposition: form-data; name="%d"\r\n\r\n\r\n' % at for at in range(100))

    async def use(http: httpx.AsyncClient) -> None:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = await http.post("/files", content=parts, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert kept(tmp_path) == []

    served(tmp_path, use)


def test_what_cannot_be_read_at_a_start_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        offload = InlineOffload()
        files = FolderFiles(tmp_path, FileLimits(), offload)
        upload = await files.arriving("", "file-a", 0)
        await upload.write(b"data")
        await files.keep(upload, File("file-a", "", "a", "batch", 4, 0))
        upload.close()
        files.close()
        known = (tmp_path / "file-a.json").read_bytes()
        (tmp_path / "file-a.json").write_bytes(b"of another release")
        files = FolderFiles(tmp_path, FileLimits(), offload)
        assert await files.list("", 0) == []
        files.close()
        (tmp_path / "file-a.json").write_bytes(known)
        files = FolderFiles(tmp_path, FileLimits(), offload)
        assert files.path((await files.list("", 0))[0]).read_bytes() == b"data"
        files.close()

    asyncio.run(main())


def test_a_client_that_takes_nothing_holds_a_file_no_longer_than_it_may(tmp_path: Path) -> None:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "path": "/v1/files/file-a/content",
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
        "root_path": "",
    }
    taken: list[str] = []

    async def stuck(*message: Any) -> Any:
        taken.extend(each["type"] for each in message)
        if len(taken) > 1 or not message:  # only how it begins is taken
            await asyncio.Event().wait()

    async def main() -> None:
        offload = InlineOffload()
        files = FolderFiles(tmp_path / "files", FileLimits(), offload)
        upload = await files.arriving("", "file-a", 0)
        await upload.write(b"data")
        await files.keep(upload, File("file-a", "", "a", "batch", 4, 0))
        upload.close()
        jobs = Jobs(files, folder_batches(tmp_path / "batches", files, offload, 10))
        config = ApiConfig(send_timeout_s=0.05)
        app = create_app(FakeDispatcher(say("hi")), {"org/fake": FakeText()}, lambda: b"", config, offload, jobs=jobs)
        before = len(os.listdir("/proc/self/fd"))
        async with asyncio.timeout(5):
            await app(scope, stuck, stuck)
        assert taken == ["http.response.start", "http.response.body"]
        assert len(os.listdir("/proc/self/fd")) == before
        files.close()

    asyncio.run(main())
