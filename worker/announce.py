"""What a worker tells the fleet of itself when it joins."""

import msgspec

from tracehaul.wire.cluster import NodeInfo, WorkerLimits
from worker.host import WorkerHost
from worker.iteration import usable_context
from worker.rates import STRETCH


def announced(info: NodeInfo, host: WorkerHost) -> NodeInfo:
    """``info`` with all that placing a step has to know: rates as of now, so after calibration."""
    engine, config = host.engine.info, host.config
    return msgspec.structs.replace(
        info,
        model=engine.model,
        root=host.root,
        block_tokens=engine.layout.block_tokens,
        context_max=usable_context(engine),
        engine="native",
        roles=("prefill", "decode"),
        features=("constraints", "prompt_logprobs", "recall") if info.role == "decode" else (),
        limits=WorkerLimits(
            kv_tokens_max=engine.kv_tokens_max,
            sequences_max=config.sequences_max,
            waiting_max=config.waiting_max,
            chunk_tokens=config.chunk_tokens,
            local_prefill_tokens=config.local_prefill_tokens if info.role == "decode" else 0,
            stretch=STRETCH,
        ),
        rates=host.loop.meter.rates,
    )
