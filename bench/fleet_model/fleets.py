"""The fleets that are simulated unless a file describes another: accelerators of one kind, eight to a host. Pure.

A dense model of 8 billion parameters in 16 bits with grouped attention: 128 KiB of KV a token, on accelerators of 990
TFLOP/s and 4.8 TB/s with 110 GB for KV, at about half of the one and most of the other. Each has a share of 128 GiB of
its host's memory and of 2.6 TB of its disks, reached over links of 45 GB/s, and from disk at 6 GB/s.
"""

import msgspec

from sim.fleet.shape import Shape, StoreKind, WorkerKind

HOST_WORKERS = 8
MEMORY_TOKENS = 1_000_000
"""Of host memory, per worker."""
DISK_TOKENS = 20_000_000

ACCELERATOR = WorkerKind(
    count=1,
    token_s=3.5e-5,
    pair_s=1.3e-9,
    iteration_s=5e-3,
    sequence_s=5e-5,
    context_token_s=2.7e-8,
    pull_token_s=2.8e-6,
    kv_tokens=860_000,
    pull_s=0.01,
    step_s=0.005,
    chunk_tokens=2048,
    local_prefill_tokens=1_000_000_000,
)


CONTEXT_MAX = ACCELERATOR.kv_tokens // 2
"""Longest context that is served, in tokens."""


def fleet_of(workers: int, *, private: bool, disk: bool, block_tokens: int, kind: WorkerKind = ACCELERATOR) -> Shape:
    """``workers`` of them. ``private``: each reads its own share of its host's memory and disks, else there is a store
    node per host that all read: the same bytes either way."""
    each = 1 if private else min(HOST_WORKERS, workers)
    store = StoreKind(
        count=-(-workers // each),
        memory_tokens=MEMORY_TOKENS * each,
        link_token_s=0.0 if private else kind.pull_token_s / each,
        disk_tokens=DISK_TOKENS * each if disk else 0,
        disk_token_s=2.1e-5 / each,
    )
    return Shape((msgspec.structs.replace(kind, count=workers),), (store,), block_tokens)
