"""A program: ``tracehaul``, of whichever release is on the path, whose workers' engine is the fake one.

By the environment: ``FAKE_ITERATION_S``, what an iteration takes; ``FAKE_PREFILL_TOKEN_S``, ``FAKE_SEQUENCE_S`` and
``FAKE_COPY_TOKEN_S``, what each token of a prompt, each sequence and each token that is copied add; and
``FAKE_VOCABULARY``, tokens; without the latter that of the model which the config leaves out.
"""

import os
import sys
import types
from typing import Any

import msgspec

from cluster.cli import main
from tracehaul.engine.fake import EngineCost, FakeEngine, fake_info

COSTS = ("iteration_s", "prefill_token_s", "sequence_s", "copy_token_s")
TOLD = {name: float(told) for name in COSTS if (told := os.environ.get(f"FAKE_{name.upper()}"))}
"""Only what is said: a release before this one has fewer."""
COST = EngineCost(**{"iteration_s": 0.002, **TOLD})


def vocabulary() -> int:
    """Of what is served."""
    if told := os.environ.get("FAKE_VOCABULARY"):
        return int(told)
    from tracehaul.model.source import read_config, resolve

    return read_config(resolve()).vocab_size


async def load(config: Any) -> FakeEngine:
    """In place of the real one's."""
    tokens = config.kv_tokens_max
    info = fake_info(kv_tokens_max=tokens, context_max=tokens, vocab_size=vocabulary())
    return FakeEngine(msgspec.structs.replace(info, model=config.name), COST)


if __name__ == "__main__":
    fake: Any = types.ModuleType("tracehaul.engine.torch_engine")
    fake.TorchEngine = types.SimpleNamespace(load=load)
    fake.TorchEngineConfig = types.SimpleNamespace
    sys.modules[fake.__name__] = fake
    main()
