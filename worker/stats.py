"""What a worker counts of its life. Pure."""

import msgspec


class WorkerStats(msgspec.Struct):
    """Counters of one worker's life, for metrics; tokens unless they say otherwise."""

    steps: int = 0
    steps_failed: int = 0
    steps_aborted: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    resident_tokens: int = 0
    pulled_tokens: int = 0
    pulled_bytes: int = 0
    pull_s: float = 0.0
    missed_blocks: int = 0
    evicted_sequences: int = 0
    suspended_steps: int = 0
    background_suspended: int = 0
    """Of those, steps of the background."""
    prefill_fallbacks: int = 0
    write_back_refused: int = 0
    recalled_tokens: int = 0
    """Pulled before a step asked for them."""
    tokens_again: int = 0
    """Sampled for a router that was lost, and told to another."""
