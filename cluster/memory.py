"""Whether a host's memory is enough for the nodes that are to run there. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cluster.config import ClusterConfig
from cluster.plan import NodeSpec, PoolPlan

MIB, GIB = 2**20, 2**30
WORKER_BYTES = 320 * MIB
"""Of a worker's process beside weights, KV and staging: measured 230 to 275 MiB."""
PROCESS_BYTES = 128 * MIB
"""Of any other beside its arena: measured 60 to 110 MiB."""


class ModelSize(NamedTuple):
    """What a model takes on a host."""

    weights_bytes: int
    """Of one copy, in the form in which a worker uses it."""
    shared: str
    """Workers with the same word here map one copy; empty: each has its own."""
    token_bytes: int
    """Of KV."""


class Need(NamedTuple):
    """Memory that somebody needs."""

    what: str
    nbytes: int
    option: str
    """What makes it smaller."""


class Available(NamedTuple):
    """Memory that there is."""

    nbytes: int
    whose: str
    """What ends it: the machine, or a limit."""


def needs(
    config: ClusterConfig,
    nodes: Iterable[NodeSpec],
    pools: Sequence[PoolPlan],
    sizes: Mapping[str, ModelSize],
    *,
    staging_bytes: int,
    on_gpu: bool,
) -> list[Need]:
    """What these nodes, all of one host, need of its memory; the largest first.

    Args:
        config: the cluster's.
        nodes: those of the host.
        pools: with nothing left open.
        sizes: of each pool's model, by the pool's name.
        staging_bytes: of one staging buffer: a block of the largest model.
        on_gpu: weights and KV are in a GPU's memory.
    """
    nodes = list(nodes)
    stores = sum(node.role == "store" for node in nodes)
    found = [Need(f"the arenas of {_count(stores, 'store node')}", stores * config.store_bytes, "--store-bytes")]
    mapped: set[str] = set()
    workers = 0
    for pool in pools:
        count = sum(node.role in ("prefill", "decode") and node.pool == pool.name for node in nodes)
        if not count:
            continue
        workers += count
        if pool.config.engine != "native":
            continue  # a stock server takes what its own options say
        of = f"{_count(count, 'worker')} of {pool.model.name}"
        size, said = sizes[pool.name], pool.config
        staging = (said.worker or config.worker).staging_blocks * staging_bytes
        found.append(Need(f"staging of {of}", count * staging, "worker.staging_blocks"))
        if on_gpu:
            continue
        found.append(
            Need(f"KV of {of}", count * (said.kv_tokens or config.kv_tokens) * size.token_bytes, "--kv-tokens")
        )
        smaller = "a smaller model" if said.weights else "--weights int8, or a smaller model"
        if size.shared in mapped:
            continue
        mapped |= {size.shared} - {""}
        held = size.weights_bytes * (1 if size.shared else count)
        found.append(Need(f"weights of {of}{', shared' if size.shared and count > 1 else ''}", held, smaller))
    found.append(Need(f"{_count(workers, 'process')} of workers", workers * WORKER_BYTES, "fewer workers"))
    others = len(nodes) - workers
    found.append(Need(f"{_count(others, 'other process')}", others * PROCESS_BYTES, "fewer nodes"))
    return sorted((need for need in found if need.nbytes), key=lambda need: -need.nbytes)


def shortage(asked: Sequence[Need], available: Available) -> str | None:
    """A line that says what needs how much and what would make it smaller; None: it fits."""
    total = sum(need.nbytes for need in asked)
    if total <= available.nbytes:
        return None
    parts = "; ".join(f"{_size(need.nbytes)} for {need.what} ({need.option})" for need in asked)
    return f"not enough memory: {_size(total)} asked, {_size(available.nbytes)} available ({available.whose}): {parts}"


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.0f} MiB"


def _count(count: int, what: str) -> str:
    many = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{count} {what if count == 1 else many}"
