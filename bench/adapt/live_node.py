"""A program: ``tracehaul``, whose workers' engine is the fake one, at the pace of a slow accelerator."""

import sys
import types
from typing import Any

import msgspec

from cluster.cli import main
from tracehaul.engine.fake import EngineCost, FakeEngine, fake_info
from tracehaul.model.source import read_config, resolve

COST = EngineCost(iteration_s=0.05, prefill_token_s=0.002, sequence_s=0.008, copy_token_s=1e-6)
"""So slow that two cores can be six processes."""


async def load(config: Any) -> FakeEngine:
    """In place of the real one's."""
    tokens, vocabulary = config.kv_tokens_max, read_config(resolve()).vocab_size
    info = fake_info(kv_tokens_max=tokens, context_max=tokens, vocab_size=vocabulary)
    return FakeEngine(msgspec.structs.replace(info, model=config.name), COST)


if __name__ == "__main__":
    fake: Any = types.ModuleType("tracehaul.engine.torch_engine")
    fake.TorchEngine = types.SimpleNamespace(load=load)
    fake.TorchEngineConfig = types.SimpleNamespace
    sys.modules[fake.__name__] = fake
    main()
