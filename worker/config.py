"""What an operator may set on a worker."""

from typing import Annotated

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


class WorkerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits and sizes of one prefill or decode worker, beside its engine's own."""

    chunk_tokens: Count = 512
    """Most tokens that one iteration computes: the longest that a decode step waits behind a prompt."""
    sequences_max: Count = 64
    """Most sequences in one iteration."""
    waiting_max: Count = 256
    """Steps that may wait for KV memory; more are refused."""
    headroom_tokens: Count = 256
    """Room for output reserved with the prompt, and the step in which it grows."""
    local_prefill_tokens: Annotated[int, Meta(ge=0)] = 256
    """A decode worker computes up to this many missing tokens itself instead of asking a prefill worker."""
    use_store: bool = True
    """Without it nothing is read from the store or left there, to compare with; together with the router's."""
    staging_blocks: Count = 64
    """Buffers between the engine and the transports."""
    group_blocks: Count = 16
    """Blocks per request when pulling and publishing: the next group travels while one is copied."""
    store_timeout_s: Seconds = 2.0
    """Longest wait for one group of blocks."""
    prefill_idle_timeout_s: Seconds = 5.0
    """Longest silence of a prefill worker before its step is computed here."""

    def __post_init__(self) -> None:
        if self.group_blocks > self.staging_blocks:
            raise ValueError("group_blocks must not exceed staging_blocks")
        if self.chunk_tokens < 2 or self.sequences_max < 2:
            raise ValueError("chunk_tokens and sequences_max must be at least 2: a prompt and a decode step share")
