"""What clients send to ``/v1/completions``. Pure."""

from typing import Annotated

from msgspec import Meta

from router.calls.errors import invalid
from router.dialects.openai.requests import GenerationRequest, integer

TOLD_ITEMS = Meta(extra_json_schema={"minItems": 1})
OUTPUT_TOKENS = 16
"""Where nothing is said of ``max_tokens``, as OpenAI has it."""


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | Annotated[list[str | int | Annotated[list[int], TOLD_ITEMS]], TOLD_ITEMS]
    logprobs: int | bool | None = None
    echo: bool | None = None
    suffix: str | None = None

    def output_limit(self) -> tuple[str, int | None, int]:
        return "max_tokens", OUTPUT_TOKENS if self.max_tokens is None else self.max_tokens, 0 if self.echo else 1

    def likeliest(self) -> int | None:
        if self.logprobs is None or self.logprobs is False:
            return None
        return integer("logprobs", int(self.logprobs), 0)

    def echoed(self) -> bool:
        return bool(self.echo)


def split(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The prompts in ``prompt``'s four forms: a string, strings, ids, lists of ids.

    Raises:
        CallFailed: it mixes them, or is or holds an empty list.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt or any(item == [] for item in prompt):
        raise invalid("the prompt is empty", "prompt")
    ids = [item for item in prompt if isinstance(item, int)]
    if ids and len(ids) == len(prompt):
        return [ids]
    several = [item for item in prompt if not isinstance(item, int)]
    if len({type(item) for item in prompt}) > 1:
        raise invalid("prompt must be all strings, all token ids, or all lists of token ids", "prompt")
    return several
