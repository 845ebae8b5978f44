"""Whose batches are whose: a batch's lines are calls of the key that asked for it, as long as that is valid."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from jobs.files import FileLimits
from jobs.folder.files import FolderFiles
from router.calls.fakes import FakeDispatcher, FakeText, say
from router.http.app import create_app
from router.http.config import ApiConfig
from router.http.jobs import Jobs
from router.http.keys import Key, Keyring, hashed
from sim.lifespan import living
from tests.folder_jobs import folder_batches
from tracehaul.runtime.offload import InlineOffload

SECRETS = {"acme": f"th-0123abcd-{'s' * 43}", "other": f"th-4567abcd-{'t' * 43}"}
KEYS = {
    tenant: Key(secret[3:11], hashed(secret), tenant=tenant, models=("org/fake",) if tenant == "acme" else ())
    for tenant, secret in SECRETS.items()
}
OVER = ("completed", "failed", "expired", "cancelled")


Use = Callable[[httpx.AsyncClient, Keyring, FakeDispatcher], Awaitable[None]]


def served(folder: Path, use: Use) -> None:
    async def main() -> None:
        offload = InlineOffload()
        files = FolderFiles(folder / "files", FileLimits(), offload)
        keyring, dispatcher = Keyring(tuple(KEYS.values())), FakeDispatcher(say("hi"))
        jobs = Jobs(files, folder_batches(folder / "batches", files, offload, 10))
        texts = {"org/fake": FakeText()}
        app = create_app(dispatcher, texts, lambda: b"", ApiConfig(), offload, keyring=keyring, jobs=jobs)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with asyncio.timeout(20), living(app), httpx.AsyncClient(transport=transport) as http:
            await use(http, keyring, dispatcher)
        files.close()

    asyncio.run(main())


def client(http: httpx.AsyncClient, tenant: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key=SECRETS[tenant], base_url="http://test/v1", http_client=http, max_retries=0)


async def begin(of: openai.AsyncOpenAI, lines: int = 1, **more: Any) -> Any:
    body = {"model": "org/fake", "prompt": "hi", **more}
    calls = [{"custom_id": str(at), "method": "POST", "url": "/v1/completions", "body": body} for at in range(lines)]
    file = await of.files.create(file=("a", b"\n".join(map(msgspec.json.encode, calls))), purpose="batch")
    return await of.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


async def over(of: openai.AsyncOpenAI, batch: Any) -> Any:
    while batch.status not in OVER:
        await asyncio.sleep(0.01)
        batch = await of.batches.retrieve(batch.id)
    return batch


def test_lines_are_calls_of_their_tenant_below_all_others(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient, keyring: Keyring, dispatcher: FakeDispatcher) -> None:
        acme = client(http, "acme")
        done = await over(acme, await begin(acme))
        assert (done.status, done.request_counts.completed) == ("completed", 1)
        (request,) = dispatcher.requests
        assert (request.tenant, request.step_class, request.priority) == ("acme", "background", -1_000_000)

    served(tmp_path, use)


def test_what_a_line_leaves_is_kept_only_for_what_may_follow(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient, keyring: Keyring, dispatcher: FakeDispatcher) -> None:
        acme = client(http, "acme")
        for more in ({}, {"metadata": {"trace_id": "t"}}, {"prompt_cache_key": "k"}):
            await over(acme, await begin(acme, **more))
        assert [request.final for request in dispatcher.requests] == [True, False, False]

    served(tmp_path, use)


def test_a_tenant_sees_its_own(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient, keyring: Keyring, dispatcher: FakeDispatcher) -> None:
        acme, other = client(http, "acme"), client(http, "other")
        done = await over(acme, await begin(acme))
        assert [batch.id async for batch in await other.batches.list()] == []
        for hidden in (
            other.batches.retrieve(done.id),
            other.batches.cancel(done.id),
            other.files.content(done.output_file_id),
            other.batches.create(input_file_id=done.input_file_id, endpoint="/v1/completions", completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                await hidden

    served(tmp_path, use)


def test_a_model_that_its_key_may_not_use_fails_it(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient, keyring: Keyring, dispatcher: FakeDispatcher) -> None:
        other = client(http, "other")
        done = await over(other, await begin(other))
        assert (done.status, done.errors.data[0].code) == ("failed", "model_not_allowed")
        assert not dispatcher.requests

    served(tmp_path, use)


def test_a_key_that_is_not_valid_any_more_asks_nothing(tmp_path: Path) -> None:
    async def use(http: httpx.AsyncClient, keyring: Keyring, dispatcher: FakeDispatcher) -> None:
        acme, lines = client(http, "acme"), 40
        dispatcher.script = lambda request: [0.05, *say("hi")(request)]
        batch = await begin(acme, lines)
        while not dispatcher.requests:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        newer = f"th-89abcdef-{'u' * 43}"
        keyring.replace((Key(newer[3:11], hashed(newer), tenant="acme"),))
        asked = len(dispatcher.requests)
        acme = acme.with_options(api_key=newer)
        done = await over(acme, batch)
        assert len(dispatcher.requests) == asked < lines
        assert done.request_counts.completed + done.request_counts.failed == lines
        errors = (await acme.files.content(done.error_file_id)).text
        assert errors.count('"invalid_api_key"') == done.request_counts.failed > 0

    served(tmp_path, use)
