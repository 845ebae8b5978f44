"""Whether a host's memory is enough for the nodes that are to run there. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cluster.config import ClusterConfig
from cluster.plan import NodeSpec, PoolPlan
from engines.adapter.footprint import Footprint

MIB, GIB = 2**20, 2**30
SERVER_BYTES = 2 * GIB
"""Of a stock server's processes beside weights, KV and staging: measured 1.8 to 2.5 GiB, one rank on a CPU."""
STAGING_BYTES = 256 * MIB
"""Of its plugin, of each rank: as :class:`engines.blocks.config.EngineConfig` has it."""
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
    stock: Footprint | None = None
    """What a server of it takes that its worker starts; None: our own engine computes."""


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
        stock = sizes[pool.name].stock
        if stock is not None:
            servers = [node.name for node in nodes if node.role in ("prefill", "decode") and node.pool == pool.name]
            started = sum(name not in pool.config.attach for name in servers)
            shares = (pool.config.worker or config.worker).use_store
            found += _of_servers(pool, sizes[pool.name], stock, started, shares=shares, on_gpu=on_gpu)
            continue
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


def _of_servers(
    pool: PoolPlan, size: ModelSize, stock: Footprint, count: int, *, shares: bool, on_gpu: bool
) -> list[Need]:
    """What so many stock servers take. What their options do not say of KV is not known, and not counted."""
    of = f"{_count(count, 'server')} of {pool.model.name}"
    found = [Need(f"processes of {of}", count * stock.ranks * SERVER_BYTES, "fewer workers")]
    if shares:
        staging = count * stock.ranks * STAGING_BYTES
        found.append(Need(f"staging of {of}", staging, "fewer workers, or use_store = false"))
        found.append(Need(f"host pages of {of}", count * stock.host_bytes, stock.option))
    if not on_gpu:
        found.append(Need(f"KV of {of}", count * stock.computed_bytes, stock.option))
        found.append(Need(f"weights of {of}", count * size.weights_bytes, "a smaller model"))
    return found


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
