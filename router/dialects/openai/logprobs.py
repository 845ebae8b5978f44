"""What OpenAI's dialects have in common when they tell logprobs. Pure."""

LOGPROB_MIN = -9999.0
"""What OpenAI's API says of what is all but impossible; JSON has no infinity."""


def told(logprob: float) -> float:
    """A logprob as JSON can hold it."""
    return max(logprob, LOGPROB_MIN)
