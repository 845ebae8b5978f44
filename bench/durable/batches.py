"""A large batch taken in at a real router.

``batch.rss``: by how much the router's memory grows at most while 200 MB are uploaded, validated and started, in MB;
``batch.validate``: lines a second that are validated, as ``batch.validate.router`` with all that a router does beside.
A fake worker computes nothing.
"""

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console

from bench.common.report import Result
from bench.router.fleet import router_alone
from jobs.folder.reading import check_file
from jobs.lines import Limits
from tracehaul.model.text import Text
from tracehaul.runtime import clock

LINES, LINES_QUICK = 50_000, 5_000
LINE_BYTES = 3_850
LOOK_S = 0.02
STORE_BYTES = 1 << 26
"""Nobody starts a store: what is planned is checked against the memory there is."""
TIMEOUT_S = 300.0
OVER = ("completed", "failed", "expired", "cancelled")


def line(model: str, at: int, prompt: str, **more: Any) -> bytes:
    """One call."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], **more}
    call = {"custom_id": f"line-{at}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return msgspec.json.encode(call) + b"\n"


def sleep(seconds: float) -> None:
    """Wait."""
    asyncio.run(asyncio.sleep(seconds))


class Batch:
    """One at that router, from its file on."""

    def __init__(self, port: int, path: Path) -> None:
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=TIMEOUT_S, trust_env=False)
        with path.open("rb") as file:
            sent = self._http.post("/files", data={"purpose": "batch"}, files={"file": ("calls.jsonl", file)})
        asked = {"input_file_id": sent.json()["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        self._id = self._http.post("/batches", json=asked).raise_for_status().json()["id"]

    def now(self, meanwhile: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """As the router tells of it, once it does."""
        while True:
            meanwhile()
            try:
                return self._http.get(f"/batches/{self._id}").raise_for_status().json()
            except (httpx.TransportError, httpx.HTTPStatusError):
                sleep(LOOK_S)

    def cancel(self) -> None:
        """End it."""
        self._http.post(f"/batches/{self._id}/cancel").raise_for_status()

    def lines(self, file: str | None) -> list[dict[str, Any]]:
        """Of a file of results."""
        if file is None:
            return []
        content = self._http.get(f"/files/{file}/content").raise_for_status().content
        return [msgspec.json.decode(each) for each in content.splitlines()]


def intake(text: Text, console: Console, *, quick: bool) -> list[Result]:
    """``batch.rss`` and ``batch.validate``."""
    lines = LINES_QUICK if quick else LINES
    with (
        tempfile.TemporaryDirectory() as folder,
        router_alone(text, console, store_bytes=STORE_BYTES, traces_keep_s=0.0) as fleet,
    ):
        path = Path(folder) / "calls.jsonl"
        with path.open("wb") as file:
            for at in range(lines):
                file.write(line(fleet.model, at, f"{at:08}" + "word " * (LINE_BYTES // 5), max_tokens=1))
        began_s = clock.perf_s()
        checked = check_file(path, "/v1/chat/completions", lambda model: None, Limits(lines_max=lines))
        alone = lines / (clock.perf_s() - began_s)
        assert len(checked.table) == lines
        assert not checked.wrong
        before_mb = fleet.rss_mb()
        fleet.forget_peak()
        began_s = clock.perf_s()
        batch = Batch(fleet.port, path)
        uploaded_s = clock.perf_s()
        while (now := batch.now())["status"] == "validating":
            sleep(LOOK_S)
        validated_s = clock.perf_s()
        assert now["status"] == "in_progress", now
        while sum(batch.now()["request_counts"][kind] for kind in ("completed", "failed")) == 0:
            sleep(LOOK_S)
        more_mb = fleet.peak_mb() - before_mb
        batch.cancel()
        return [
            Result("batch.rss", more_mb, "MB"),
            Result("batch.file", path.stat().st_size / 1e6, "MB"),
            Result("batch.upload", path.stat().st_size / 1e6 / (uploaded_s - began_s), "MB/s"),
            Result("batch.validate", alone, "lines/s"),
            Result("batch.validate.router", lines / (validated_s - uploaded_s), "lines/s"),
        ]
