"""Limits of the HTTP surface."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


ToolFormat = Literal["auto", "hermes", "mistral", "llama3"]


class ApiConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every limit that a client can meet, and what it is told there."""

    requests_max: Count = 1024
    """Generation calls in progress; one more is answered 503."""
    body_bytes_max: Count = 8 * 2**20
    """Longer bodies are answered 413 without being read to the end."""
    body_timeout_s: Seconds = 30.0
    """A client that takes longer to send its body is answered 408."""
    send_timeout_s: Seconds = 60.0
    """A client that reads nothing for this long is taken for gone."""
    keepalive_s: Seconds = 10.0
    """After this much silence a stream starts, if it has not, and carries a comment."""
    choices_max: Count = 64
    """Choices of one call: prompts times ``n``."""
    tool_format: ToolFormat = "auto"
    """How the model writes calls of tools; ``auto``: as its chat template tells."""
