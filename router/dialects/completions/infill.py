"""A completion between two texts, in the words of models that were trained for it. Pure."""

from collections.abc import Sequence

from router.calls.errors import invalid, unsupported
from router.calls.text import Text
from router.dialects.completions.requests import CompletionRequest

MARKERS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)
"""Tokens before the text that precedes, before the one that follows, and before what is wanted: of Qwen, StarCoder and
DeepSeek."""


def infilled(prompts: Sequence[str | list[int]], request: CompletionRequest, text: Text) -> Sequence[str | list[int]]:
    """The prompts with the text that is to follow their completions, where there is one.

    Raises:
        CallFailed: the model has no tokens for that, or the request cannot be put so.
    """
    suffix = request.suffix
    if not suffix:
        return prompts
    markers = next((known for known in MARKERS if all(len(text.encode(marker)) == 1 for marker in known)), None)
    if markers is None:
        raise unsupported("suffix", "a suffix, by a model without tokens for infilling,")
    if request.echo:
        raise invalid("echo and a suffix contradict each other", "echo")
    before, after, here = markers
    found: list[str | list[int]] = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise invalid("a suffix needs prompts in text", "suffix")
        found.append(f"{before}{prompt}{after}{suffix}{here}")
    return found
