"""A router, a store node and four workers with the fake engine, each a process."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from bench.common.fake_machine import Machine, running
from router.adapt.loop import AdaptConfig
from router.dispatch.config import DispatchConfig
from router.fleet.flips import FlipConfig
from tracehaul.engine.fake import EngineCost
from worker.config import WorkerConfig

WORKERS = 4
STORE_BYTES, KV_TOKENS = 512 << 20, 1 << 16
WORKER = WorkerConfig(chunk_tokens=256, local_prefill_tokens=64, sequences_max=64)
COST = EngineCost(iteration_s=0.05, prefill_token_s=0.002, sequence_s=0.008, copy_token_s=1e-6)
"""So slow that two cores can be six processes."""


def fleet(folder: Path, prefills: int, adapt: AdaptConfig) -> AbstractAsyncContextManager[str]:
    """With so many workers for prompts at first; see :func:`bench.common.fake_machine.running`."""
    dispatch = DispatchConfig(adapt=adapt, flips=FlipConfig(drain_s=1.0, cooldown_s=1.0))
    decodes = WORKERS - prefills
    return running(folder, Machine(dispatch, KV_TOKENS, decodes, prefills, 1, STORE_BYTES, WORKER, COST))
