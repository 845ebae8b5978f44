"""What a config asks for below a store node's memory."""

from contextlib import AsyncExitStack

from cluster.config import ClusterConfig, disk_path
from cluster.rundir import RunDir
from kvstore.node.assemble import Backing
from kvstore.node.pin_journal import open_journal
from kvstore.tiers.base import Tier
from kvstore.tiers.disk import open_disk
from kvstore.tiers.s3 import open_s3
from kvstore.tiers.stack import Stack


async def open_backing(config: ClusterConfig, run: RunDir, name: str, slot_bytes: int) -> Backing | None:
    """The tiers of this store node, and its pins beside them; None without tiers: its pins live as long as it.

    Raises:
        NoDisk, NoBucket, OSError: it cannot be had.
    """
    path = disk_path(config, run, name)
    async with AsyncExitStack() as stack:  # of what is to be closed if the rest cannot be had
        tiers: list[Tier] = []
        if config.disk_bytes:
            tiers.append(await open_disk(path, config.disk_bytes, slot_bytes))
            stack.callback(tiers[-1].close)
        if config.s3_bytes:
            tiers.append(await open_s3(config.s3_url, name, config.s3_bytes, slot_bytes))
            stack.callback(tiers[-1].close)
        if not tiers:
            return None
        tier = tiers[0] if len(tiers) == 1 else Stack(tiers[0], tiers[1], slot_bytes)
        pins = path.with_suffix(".pins")  # the lock on the disk's file is on it too, or else the run directory's
        pins.parent.mkdir(parents=True, exist_ok=True)
        journal = await open_journal(pins)
        stack.pop_all()
        return Backing(tier, config.tiering, journal)
