"""Limits of the HTTP surface."""

from typing import Annotated

from msgspec import Meta

from router.calls.limits import CallLimits, Count

Seconds = Annotated[float, Meta(gt=0)]


class ApiConfig(CallLimits, frozen=True, forbid_unknown_fields=True):
    """Every limit that a client can meet, and what it is told there."""

    body_bytes_max: Count = 8 * 2**20
    """Longer bodies are answered 413 without being read to the end."""
    body_timeout_s: Seconds = 30.0
    """A client that takes longer to send its body is answered 408."""
    send_timeout_s: Seconds = 60.0
    """A client that reads nothing for this long is taken for gone."""
    keepalive_s: Seconds = 10.0
    """After this much silence a stream starts, if it has not, and carries a comment."""
    responses_max: Count = 4096
    """Responses that are kept for later calls (``store``); beyond it, as beyond the next, old ones are forgotten."""
    responses_bytes_max: Count = 256 * 2**20
    responses_age_s: Seconds = 86400.0
    """Older ones are forgotten, too."""
    background_max: Count = 64
    """Responses that run in the background; more are answered 503."""
