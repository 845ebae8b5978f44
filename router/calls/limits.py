"""Limits of calls."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]

ToolFormat = Literal["auto", "hermes", "mistral", "llama3"]


class CallLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every limit that a call can meet, in whatever dialect."""

    requests_max: Count = 1024
    """Generation calls in progress; one more is answered 503."""
    choices_max: Count = 64
    """Choices of one call: prompts times ``n``."""
    traces_max: Count = 4096
    """Traces whose text is remembered with the ids it was generated with."""
    messages_max: Count = 262_144
    """Messages by whose digests calls without a name find their trace, over all traces; 200 bytes each."""
    texts_bytes_max: Count = 256 * 2**20
    """Memory for those."""
    tool_format: ToolFormat = "auto"
    """How the model writes calls of tools; ``auto``: as its chat template tells."""
