"""What a client reads of an answer over HTTP: server-sent events or one body, in either dialect. Pure."""

from typing import Any

import msgspec

from router.dispatch.gate import NotAdmitted
from router.http.errors import RETRY_AFTER_S

_DATA, _ID = b"data: ", b"id: "
_DONE = b"[DONE]"
_BUSY = "service_unavailable"


class CallFailed(Exception):
    """A call that its client was refused, or lost; ``retriable``: the client may try again."""

    def __init__(self, code: str, message: str, *, retriable: bool, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.retriable = retriable
        self.retry_after_s = retry_after_s
        """When its trace may begin; None: that is not why."""


class Told(msgspec.Struct, frozen=True):
    """What one object of an answer tells."""

    prompt: list[int] | None = None
    """The prompt in tokens, with the first one that tells any."""
    tokens: list[int] = []
    text: str = ""
    marks: int = 0
    """Tokens whose logprobs it tells."""
    reason: str | None = None
    usage: dict[str, Any] | None = None
    event: str | None = None
    """The event's id."""
    call: str = ""
    """The answer's."""


class Answer:
    """One answer, as far as it has arrived."""

    def __init__(self, status: int, headers: dict[str, str]) -> None:
        self._ok = status == 200
        self._streams = headers["content-type"].startswith("text/event-stream")
        self._retry = headers.get("retry-after")
        self._buffer = b""
        self.ended = False
        """It said that nothing follows."""

    def feed(self, data: bytes, *, last: bool) -> list[Told]:
        """What has become complete with ``data``.

        Raises:
            CallFailed: it says that the call has failed.
        """
        self._buffer += data
        if self._streams:
            *events, self._buffer = self._buffer.split(b"\n\n")
            return [told for event in events if (told := self._event(event)) is not None]
        if not last:
            return []
        self.ended = True
        body = msgspec.json.decode(self._buffer)
        if not self._ok and body["error"]["code"] == NotAdmitted.code:
            assert self._retry is not None
            message = body["error"]["message"]
            raise CallFailed(NotAdmitted.code, message, retriable=True, retry_after_s=float(self._retry))
        if not self._ok:
            assert (self._retry == str(RETRY_AFTER_S)) == (body["error"]["type"] == _BUSY), body
        return [_read(body)]

    def _event(self, event: bytes) -> Told | None:
        if event.startswith(b":"):
            return None
        name = None
        if event.startswith(_ID):
            head, _, event = event.partition(b"\n")
            name = head[len(_ID) :].decode()
        assert event.startswith(_DATA), event
        assert not self.ended, f"{event!r} after the end"
        if event == _DATA + _DONE:
            self.ended = True
            return None
        return msgspec.structs.replace(_read(msgspec.json.decode(event[len(_DATA) :])), event=name)


def _read(body: dict[str, Any]) -> Told:
    error = body.get("error")
    if error is not None:
        raise CallFailed(error["code"] or error["type"], error["message"], retriable=error["type"] == _BUSY)
    usage = body.get("usage")
    if not body["choices"]:
        return Told(usage=usage, call=body["id"])
    (choice,) = body["choices"]
    said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
    marks = choice.get("logprobs") or {}
    return Told(
        prompt=body.get("prompt_token_ids") or choice.get("prompt_token_ids"),
        tokens=choice.get("token_ids") or [],
        text=said.get("content") or "",
        marks=len(marks.get("content") or marks.get("tokens") or ()),
        reason=choice["finish_reason"],
        usage=usage,
        call=body["id"],
    )
