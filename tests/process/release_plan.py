"""A program: writes the plan of a small cluster as whichever release is on the path does, once for each router.

Its arguments are how KV moves, and ``FOLDER:PORT`` for each router: a run directory, and where that router's API is.
"""

import sys
from pathlib import Path

from cluster.config import ClusterConfig, DispatchConfig, PoolConfig  # wherever a release has them
from cluster.launch import free_port
from cluster.plan import NodeSpec, Plan, PoolPlan, save_plan
from cluster.rundir import RunDir
from kvstore.config import StoreConfig
from tracehaul.model.source import resolve
from worker.config import WorkerConfig


def main(transport: str, *places: str) -> None:
    pool = PoolPlan("agents", resolve(), PoolConfig(kv_tokens=4096))
    nodes = [NodeSpec(f"router-{at}", "router", control_port=free_port()) for at in range(len(places))]
    nodes += [NodeSpec(f"store-{at}", "store") for at in range(2)]
    nodes += [NodeSpec(name, name[: -len("-0")], "agents") for name in ("prefill-0", "decode-0", "decode-1")]
    store = StoreConfig(arena_bytes=8 << 20, slot_bytes=4096)
    for place in places:
        folder, port = place.rsplit(":", 1)
        run = RunDir(Path(folder))
        run.create()
        # A prompt that is new is computed by the prefill worker, and pulled, whatever prices say.
        worker, dispatch = WorkerConfig(local_prefill_tokens=64, chunk_tokens=64), DispatchConfig(policy="sticky")
        config = ClusterConfig(transport=transport, port=int(port), worker=worker, dispatch=dispatch)
        save_plan(run, Plan(config, (pool,), store, tuple(nodes), name="side-by-side"))


if __name__ == "__main__":
    main(*sys.argv[1:])
