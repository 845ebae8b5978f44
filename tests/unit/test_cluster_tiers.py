"""The tiers that a config asks for."""

import asyncio
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.rundir import RunDir
from cluster.tiers import open_tiers


def test_a_disk_tier_counts_while_it_is_empty(tmp_path: Path):
    async def main() -> None:
        tier, stats = await open_tiers(ClusterConfig(disk_bytes=1 << 20), RunDir(tmp_path), "store-0", 8192)
        assert tier is not None
        assert (len(tier), list(stats)) == (0, ["disk"])
        tier.close()

    asyncio.run(main())


def test_without_disk_and_bucket_there_is_none(tmp_path: Path):
    assert asyncio.run(open_tiers(ClusterConfig(), RunDir(tmp_path), "store-0", 8192)) == (None, {})
