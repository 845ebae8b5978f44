"""The tiers that a config asks for below a store node's memory."""

from collections.abc import Mapping

import msgspec

from cluster.config import ClusterConfig, disk_path
from cluster.rundir import RunDir
from kvstore.tiers.base import Tier
from kvstore.tiers.disk import open_disk
from kvstore.tiers.s3 import open_s3
from kvstore.tiers.stack import Stack


async def open_tiers(
    config: ClusterConfig, run: RunDir, name: str, slot_bytes: int
) -> tuple[Tier | None, Mapping[str, msgspec.Struct]]:
    """What is below the memory of this store node, fastest first, and its counts by metrics' name.

    Raises:
        NoDisk, NoBucket: it cannot be had.
    """
    disk = s3 = None
    if config.disk_bytes:
        disk = await open_disk(disk_path(config, run, name), config.disk_bytes, slot_bytes)
    if config.s3_bytes:
        try:
            s3 = await open_s3(config.s3_url, name, config.s3_bytes, slot_bytes)
        except BaseException:
            if disk is not None:
                disk.close()
            raise
    if disk is None or s3 is None:
        tier = disk if disk is not None else s3  # one that is empty is false
        return tier, {} if tier is None else {tier.name: tier.stats}
    stack = Stack(disk, s3, slot_bytes)
    return stack, {disk.name: disk.stats, s3.name: s3.stats, "stack": stack.moves}
