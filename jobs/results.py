"""What is told of each line in the end: a line of the output file, or of the error file. Pure."""

from typing import Literal

import msgspec
import xxhash

from jobs.retries import Answer, NoAnswer

BEGIN = b'{"id":"batch_req_'
"""What each line begins with."""
Unasked = Literal["batch_expired", "batch_cancelled", "answer_lost"]
WHY: dict[Unasked, str] = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request was not executed: the batch was cancelled before its turn.",
    "answer_lost": "What this request was answered is lost: where it was kept, it is damaged or missing.",
}

UNASKED = ("batch_expired", "batch_cancelled")


class Told(msgspec.Struct, frozen=True):
    """What a call was answered."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class Fault(msgspec.Struct, frozen=True):
    """Why it was not."""

    code: str
    message: str


class Result(msgspec.Struct, frozen=True):
    """One line."""

    id: str
    custom_id: str
    response: Told | None
    error: Fault | None


def result(batch: str, custom_id: str, said: Answer | NoAnswer | Unasked) -> bytes:
    """The line, with its newline. A line has the same id whenever it is told of."""
    name = "batch_req_" + xxhash.xxh3_128_hexdigest(f"{batch}\0{custom_id}".encode())
    told, fault = None, None
    match said:
        case Answer():
            told = Told(said.status, said.request_id, _json(said.body))
        case NoAnswer(why=why):
            fault = Fault("no_answer", why)
        case _:
            fault = Fault(said, WHY[said])
    return msgspec.json.encode(Result(name, custom_id, told, fault)) + b"\n"


def _json(body: bytes) -> msgspec.Raw:
    """The body on one line; as a string, if it is no JSON."""
    try:
        body.decode()  # what is not UTF-8 would not be found below
        # Not spelled anew: numbers stay as they were written.
        return msgspec.Raw(msgspec.json.format(body, indent=-1))
    except (msgspec.DecodeError, UnicodeError):
        return msgspec.Raw(msgspec.json.encode(body.decode(errors="replace")))


class _Status(msgspec.Struct):
    status_code: int


class _Why(msgspec.Struct):
    code: str


class _Ended(msgspec.Struct):
    id: str
    custom_id: str
    response: _Status | None = None
    error: _Why | None = None


_decode_ended = msgspec.json.Decoder(_Ended).decode


class Ended(msgspec.Struct, frozen=True):
    """How a line ended."""

    custom_id: str
    ok: bool
    """It was answered."""
    unasked: bool
    """Its turn never came."""


def ended_by(line: bytes) -> Ended | None:
    """What this is the result of; None: it is none."""
    try:
        ended = _decode_ended(line)
    except (msgspec.DecodeError, UnicodeError):
        return None
    ok = ended.response is not None and 200 <= ended.response.status_code < 300
    return Ended(ended.custom_id, ok, ended.error is not None and ended.error.code in UNASKED)
