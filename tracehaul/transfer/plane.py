"""Which transport to use to reach a peer: one memory may be offered by several."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tracehaul.transfer.base import Region, Transfer
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.errors import TransferError

PREFERENCE = ("local", "shm", "nixl", "tcp", "ucxx")
"""Kinds by cost per byte, cheapest first."""


class Plane(NamedTuple):
    """One transport of this process, and this process's memory as that transport knows it."""

    transfer: Transfer
    region: Region


def choose(planes: Sequence[Plane], descriptors: Iterable[RegionDescriptor]) -> tuple[Plane, RegionDescriptor]:
    """The cheapest plane that reaches one of a peer's descriptors, and that descriptor.

    Raises:
        TransferError: none does.
    """
    offered = sorted(descriptors, key=lambda d: cost(d.kind))
    for remote in offered:
        for plane in planes:
            if plane.transfer.kind == remote.kind and plane.transfer.reaches(remote):
                return plane, remote
    ours = ", ".join(plane.transfer.kind for plane in planes) or "nothing"
    theirs = ", ".join(remote.kind for remote in offered) or "nothing"
    owner = offered[0].owner if offered else "a peer"
    raise TransferError(f"no transport reaches {owner}: it offers {theirs}, this process has {ours}")


def cost(kind: str) -> int:
    """Its place among the kinds by cost per byte."""
    return PREFERENCE.index(kind) if kind in PREFERENCE else len(PREFERENCE)
