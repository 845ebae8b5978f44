"""What an operator may set on a worker."""

import msgspec


class WorkerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits and sizes of one prefill or decode worker, beside its engine's own."""

    chunk_tokens: int = 512
    """Most tokens that one iteration computes: the longest that a decode step waits behind a prompt."""
    sequences_max: int = 64
    """Most sequences in one iteration."""
    waiting_max: int = 256
    """Steps that may wait for KV memory; more are refused."""
    headroom_tokens: int = 256
    """Room for output reserved with the prompt, and the step in which it grows."""
    local_prefill_tokens: int = 256
    """A decode worker computes up to this many missing tokens itself instead of asking a prefill worker."""
    staging_blocks: int = 64
    """Buffers between the engine and the transports."""
    group_blocks: int = 16
    """Blocks per request when pulling and publishing: the next group travels while one is copied."""
    store_timeout_s: float = 5.0
    """Longest wait for one group of blocks."""
    prefill_idle_timeout_s: float = 5.0
    """Longest silence of a prefill worker before its step is computed here."""
