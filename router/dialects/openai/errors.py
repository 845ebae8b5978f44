"""OpenAI's error body. Pure."""

import msgspec

from router.calls.errors import CallFailed
from router.dialects.openai.stream import DONE, event


class ErrorDetail(msgspec.Struct, frozen=True):
    """The inside of OpenAI's error body."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """OpenAI's error body."""

    error: ErrorDetail


def error_body(failure: CallFailed) -> ErrorBody:
    """What the client reads."""
    match failure.cause:
        case "unavailable":
            kind = "service_unavailable"
        case "limited":
            kind = "rate_limit_error"
        case "late":
            kind = "timeout"
        case "spent":
            kind = "insufficient_quota"
        case "failed":
            kind = "server_error"
        case _:
            kind = "invalid_request_error"
    return ErrorBody(ErrorDetail(str(failure), kind, failure.param, failure.code))


class OpenAIErrors:
    """How each of OpenAI's dialects keeps a stream alive, and how it fails."""

    keepalive = b": keepalive\n\n"

    def failed(self, failure: CallFailed) -> bytes:
        return msgspec.json.encode(error_body(failure))

    def broken(self, failure: CallFailed) -> bytes:
        return event(error_body(failure)) + DONE
