"""What clients receive from ``/v1/completions``. Pure."""

import msgspec
from msgspec import UNSET, UnsetType

from tracehaul.wire.steps import FinishReason


class TextLogprobs(msgspec.Struct, frozen=True):
    """``logprobs`` of a completion's choice: four lists of one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters of the choice's text before the token."""


class TextChoice(msgspec.Struct, frozen=True):
    """One choice of a completion, or its part in a chunk."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: TextLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
