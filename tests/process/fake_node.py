"""A program: ``tracehaul``, of whichever release is on the path, whose workers' engine is the fake one."""

import sys
import types
from typing import Any

import msgspec

from cluster.cli import main
from tracehaul.engine.fake import EngineCost, FakeEngine, fake_info

VOCABULARY = 256
ITERATION_S = 0.002


async def load(config: Any) -> FakeEngine:
    info = fake_info(kv_tokens_max=config.kv_tokens_max, vocab_size=VOCABULARY)
    return FakeEngine(msgspec.structs.replace(info, model=config.name), EngineCost(iteration_s=ITERATION_S))


if __name__ == "__main__":
    fake: Any = types.ModuleType("tracehaul.engine.torch_engine")
    fake.TorchEngine = types.SimpleNamespace(load=load)
    fake.TorchEngineConfig = types.SimpleNamespace
    sys.modules[fake.__name__] = fake
    main()
