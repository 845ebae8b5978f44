"""What a client is told when a call fails, before any dialect has put it in its form. Pure."""

from typing import Literal

Cause = Literal[
    "invalid",
    "unauthorized",
    "forbidden",
    "not_found",
    "conflict",
    "mismatched",
    "too_large",
    "unsupported_media",
    "too_slow",
    "limited",
    "late",
    "spent",
    "unavailable",
    "failed",
]
"""Whose doing it is: the client's, up to ``limited`` (asked for more than it may have for now); nobody's: its time is
over (``late``), what it may cost is spent (``spent``), or nobody is there now (``unavailable``: try again); ours."""


class CallFailed(Exception):
    """A call that ends with an error."""

    def __init__(
        self,
        cause: Cause,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        begins_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.cause: Cause = cause
        self.param = param
        """What in the client's words is at fault."""
        self.code = code
        """A name for programs; None: there is none."""
        self.request: str | None = None
        """The request's id, where it has one."""
        self.retry_after_s = retry_after_s
        """When it may go better; None: nobody knows."""
        self.begins_s = begins_s
        """In how many seconds what was refused is expected to begin; None: nobody knows."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> CallFailed:
    """The caller is wrong."""
    return CallFailed("invalid", message, param=param, code=code)


def unsupported(param: str, what: str) -> CallFailed:
    """The caller asks for something that cannot be honoured: an error, rather than an answer that ignores it."""
    return invalid(f"{what} is not supported yet", param, "unsupported_parameter")


def unavailable(message: str, code: str = "unavailable") -> CallFailed:
    """Nobody can do this now: try again."""
    return CallFailed("unavailable", message, code=code)


def model_not_found(name: str) -> CallFailed:
    """Nobody serves it."""
    return CallFailed("not_found", f"the model {name[:128]!r} does not exist", param="model", code="model_not_found")
