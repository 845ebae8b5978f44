"""What clients receive from ``/v1/chat/completions``. Pure."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token of a chat completion, and the likeliest at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """``logprobs`` of a chat completion's choice: one entry for each output token that its usage counts."""

    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(msgspec.Struct, frozen=True):
    """What is called; the pieces of a stream name it once, and add to its arguments."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class CalledCustom(msgspec.Struct, frozen=True):
    """The same of a custom tool, which takes a text."""

    name: str | UnsetType = UNSET
    input: str = ""


class ToolCall(msgspec.Struct, frozen=True):
    """One call of a tool, or a piece of one; only pieces have an index, only first ones an id."""

    function: CalledFunction | UnsetType = UNSET
    custom: CalledCustom | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function", "custom"] | UnsetType = UNSET
    index: int | UnsetType = UNSET


class AnswerMessage(msgspec.Struct, frozen=True):
    """The assistant's message; None: it has calls alone."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    function_call: CalledFunction | UnsetType = UNSET
    """The call, where the client speaks of functions."""


ChatFinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class ChatChoice(msgspec.Struct, frozen=True):
    """One choice of a chat completion."""

    index: int
    message: AnswerMessage
    finish_reason: ChatFinishReason
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class Delta(msgspec.Struct, frozen=True):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    function_call: CalledFunction | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True):
    """One choice's part in a chat chunk."""

    index: int
    delta: Delta
    finish_reason: ChatFinishReason | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
