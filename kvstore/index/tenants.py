"""Whose slots are whose: quotas, and who gives way to whom. Pure.

Tenants are counted in *groups*: each tenant with a quota is its own, all others are one together, whose quota is what
the named ones leave. So the quotas add up to the arena, and when no slot is free, either somebody is over its quota,
or the one who asks must give way itself.
"""

from collections.abc import Iterator, Mapping
from typing import NewType

from blake3 import blake3

SHARED = 0
"""The group of tenants without a quota of their own."""

TenantKey = NewType("TenantKey", int)
"""Stands for a tenant's name where there is no room for it: 64 bits of its hash, 0 for who gives none."""


def tenant_key(tenant: str | int) -> TenantKey:
    """The key of a name, the same in every process and in every life; of a key, itself."""
    if isinstance(tenant, int):
        return TenantKey(tenant)
    return TenantKey(int.from_bytes(blake3(tenant.encode()).digest(8), "little") if tenant else 0)


class Tenants:
    """Slots in use per group: published and reserved ones. Those at rest count for nobody."""

    def __init__(self, quota_bytes: Mapping[str, int], slot_bytes: int, slots_max: int) -> None:
        named = sorted(quota_bytes)
        self._group = {tenant_key(tenant): index for index, tenant in enumerate(named, start=1)}
        self.names = ("", *named)
        """By group; the shared one has none."""
        own = [quota_bytes[tenant] // slot_bytes for tenant in named]
        self._quota = [slots_max - sum(own), *own]
        self._used = [0] * len(self._quota)
        self._only = [SHARED]

    def __len__(self) -> int:
        """Groups."""
        return len(self._quota)

    def group(self, tenant: TenantKey) -> int:
        """The group that a tenant's slots count in."""
        return self._group.get(tenant, SHARED)

    def quota(self, group: int) -> int:
        """Slots that a group is sure of."""
        return self._quota[group]

    def used(self, group: int) -> int:
        """Slots in use by a group."""
        return self._used[group]

    def take(self, group: int, count: int = 1) -> None:
        """Slots are given to the group."""
        self._used[group] += count

    def give(self, group: int, count: int = 1) -> None:
        """The group has so many slots less."""
        assert self._used[group] >= count
        self._used[group] -= count

    def yielding(self, group: int) -> Iterator[int]:
        """Groups that may lose a block for one of ``group``, best first: those over their quota, furthest over
        first, ``group`` counted with the slot that it asks for; then ``group`` itself. No other ever."""
        if len(self._quota) == 1:
            yield from self._only
            return
        excess = [used - quota for used, quota in zip(self._used, self._quota, strict=True)]
        excess[group] += 1
        over = [index for index, more in enumerate(excess) if more > 0]
        yield from sorted(over, key=lambda index: (-excess[index], index != group, index))
        if group not in over:
            yield group
