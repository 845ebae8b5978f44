"""Which of a fleet's workers serve one model with one KV layout: a step is placed within its pool. Pure.

A pool is what its members are, so nothing of it is stored: the first worker of a pool says what fits, and one that does
not fit is refused when it joins.
"""

from collections.abc import Iterable, Mapping

import msgspec

from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.ids import BlockHash

WORKERS = ("prefill", "decode")
"""The roles of those that make up pools."""
UNNAMED = "the pool that has no name"


class Pool(msgspec.Struct, frozen=True):
    """Workers that can take each other's steps."""

    name: str
    """Empty for the one of a fleet that names none."""
    model: str
    """What clients call its model by."""
    root: BlockHash
    """Of its KV layout, without salt."""


def in_pool(name: str) -> str:
    """To be said of something in that pool; nothing where the fleet has but one without a name."""
    return f" in pool {name!r}" if name else ""


def pool_of(info: NodeInfo) -> Pool:
    """The pool that a worker announces."""
    return Pool(info.pool, info.model, info.root)


def pools_of(members: Iterable[NodeInfo]) -> dict[str, Pool]:
    """The pools of these members, by the name that clients call their models by."""
    return {info.model: pool_of(info) for info in members if info.role in WORKERS}


def refusal(info: NodeInfo, members: Iterable[NodeInfo], models: Mapping[str, str]) -> str | None:
    """Why a node cannot join; None if it can.

    Args:
        info: the node.
        members: all there are; an earlier life of the node does not count.
        models: what each pool serves, by the pool's name, as the fleet was set up; empty: whatever comes.
    """
    if info.role not in WORKERS:
        return None
    pool = pool_of(info)
    called = f"pool {pool.name!r}" if pool.name else UNNAMED
    if models and models.get(pool.name) != pool.model:
        served = models.get(pool.name)
        there = f"serves {served!r}" if served is not None else f"does not exist (there are {_names(models)})"
        return f"{info.node} serves {pool.model!r} in {called}, which {there}"
    for other in members:
        if other.role not in WORKERS or other.node == info.node:
            continue
        if other.pool == pool.name and pool_of(other) != pool:
            what = "KV layout" if other.model == pool.model else "model"
            return (
                f"{info.node} has another {what} than {other.node} of {called} "
                f"({pool.model!r}, layout {pool.root.hex()[:8]}; there: {other.model!r}, {other.root.hex()[:8]})"
            )
        if other.model == pool.model and other.pool != pool.name:
            return f"{info.node} serves {pool.model!r} in {called}, and {other.node} does so in another one"
    return None


def _names(models: Mapping[str, str]) -> str:
    return ", ".join(repr(name) for name in sorted(models))
