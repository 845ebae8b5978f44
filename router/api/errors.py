"""What a client is told when a call fails: OpenAI's error body, and one decided status per error of ours."""

import logging

import msgspec

from tracehaul.wire.errors import ClusterError, ContextTooLong, DeadlineExceeded, InvalidRequest

_log = logging.getLogger(__name__)

RETRY_AFTER_S = 1


class ErrorDetail(msgspec.Struct, frozen=True):
    """The inside of OpenAI's error body."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """OpenAI's error body."""

    error: ErrorDetail


class ApiError(Exception):
    """A call that ends with an HTTP status and an error body. ``retry`` adds ``Retry-After``."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry = retry

    @property
    def body(self) -> ErrorBody:
        """What the client reads."""
        return ErrorBody(ErrorDetail(str(self), self.kind, self.param, self.code))


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The caller is wrong: 400."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, what: str) -> ApiError:
    """The caller asks for something this endpoint cannot honour: 400, rather than an answer that ignores it."""
    return ApiError(400, f"{what} is not supported yet", param=param, code="unsupported_parameter")


def unavailable(message: str, code: str = "unavailable") -> ApiError:
    """Nobody can do this now: 503, try again."""
    return ApiError(503, message, kind="service_unavailable", code=code, retry=True)


def translate(error: Exception) -> ApiError:
    """The answer to any failure. What is not the caller's or the cluster's doing is a bug: logged, 500, no details."""
    match error:
        case ApiError():
            return error
        case ContextTooLong():
            return bad_request(str(error), code=error.code)
        case InvalidRequest():
            return bad_request(str(error), code=error.code)
        case DeadlineExceeded():
            return ApiError(504, str(error) or error.code, kind="timeout", code=error.code)
        case ClusterError() if error.retriable:
            return unavailable(str(error) or error.code, error.code)
        case ClusterError():
            return ApiError(500, str(error) or error.code, kind="server_error", code=error.code)
        case _:
            _log.error("unexpected failure in an API call", exc_info=error)
            return ApiError(500, "internal error", kind="server_error", code="internal")
