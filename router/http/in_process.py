"""Calls that the router makes of itself: by the same endpoints as its clients', without a socket."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import xxhash
from starlette.types import ASGIApp

from jobs.lines import Call, is_alone
from jobs.retries import Answer, NoAnswer
from router.calls.errors import CallFailed
from router.dialects.openai.errors import error_body
from router.http.access import CALLER, Caller

LEAST = -1_000_000
"""The priority of what everything else goes before."""
LEAVING_S = 5.0
"""A call that is left is waited for so long."""


GONE = Answer(
    401, msgspec.json.encode(error_body(CallFailed("unauthorized", "the API key is not valid", code="invalid_api_key")))
)
"""What whoever has no valid key any more is told."""


class InProcess:
    """Implements :class:`jobs.asking.Asker`: nobody waits for these calls."""

    def __init__(self, name: str, endpoints: Mapping[str, ASGIApp], caller: Callable[[], Caller | None]) -> None:
        """``name``: of all of them. ``endpoints``: by path. ``caller``: whose they are; None: nobody's who may call
        any more."""
        self._name = name
        self._endpoints = endpoints
        self._caller = caller
        self._failed: dict[str, int] = {}
        """How often, by ``custom_id``: then it is another call."""

    async def ask(self, call: Call, timeout_s: float, *, urgent: bool) -> Answer | NoAnswer:
        if (caller := self._caller()) is None:
            return GONE
        left = asyncio.Event()
        told: list[Mapping[str, Any]] = []
        times = self._failed.get(call.custom_id, 0)
        # The same over restarts: what a killed router had of its answer is not computed again.
        key = f"{self._name}-{xxhash.xxh3_128_hexdigest(call.custom_id.encode())}-{times}"
        scope = _scope(call, caller, key, urgent=urgent)
        body: bytes | None = bytes(call.body)

        async def receive() -> dict[str, Any]:
            nonlocal body
            if body is not None:
                message = {"type": "http.request", "body": body, "more_body": False}
                body = None
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            told.append(message)

        work = asyncio.ensure_future(self._endpoints[call.url](scope, receive, send))
        try:
            await asyncio.wait((work,), timeout=timeout_s)
            if not work.done():
                return NoAnswer(f"no answer within {timeout_s:.0f} s")
        finally:
            # As a client that leaves: that frees everything in order, which ending the task would not.
            left.set()
            if not work.done():
                await asyncio.wait((work,), timeout=LEAVING_S)
        work.result()
        said = _answer(told)
        if isinstance(said, Answer) and said.ok:
            self._failed.pop(call.custom_id, None)
        else:
            self._failed[call.custom_id] = times + 1
        return said


def _scope(call: Call, caller: Caller, key: str, *, urgent: bool) -> dict[str, Any]:
    headers = [
        (b"content-type", b"application/json"),
        (b"idempotency-key", key.encode()),
        (b"x-step-class", b"standard" if urgent else b"background"),
        (b"x-priority", str(LEAST).encode()),
    ]
    if is_alone(call):
        # Else what it leaves would be kept, and brought back, rather than contexts of traces that go on.
        headers.append((b"x-trace-final", b"true"))
    return {"type": "http", "method": "POST", "path": call.url, "query_string": b"", "headers": headers, CALLER: caller}


def _answer(told: list[Mapping[str, Any]]) -> Answer | NoAnswer:
    if not told:
        return NoAnswer("the call ended without an answer")
    headers = {name.decode(): value.decode("latin-1") for name, value in told[0]["headers"]}
    after = headers.get("retry-after")
    return Answer(
        told[0]["status"],
        b"".join(message.get("body", b"") for message in told[1:]),
        headers.get("x-request-id", ""),
        None if after is None else float(after),
    )
