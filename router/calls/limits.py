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
    tool_format: ToolFormat = "auto"
    """How the model writes calls of tools; ``auto``: as its chat template tells."""
