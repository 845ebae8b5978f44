"""Which tiers a config opens."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cluster.config import ClusterConfig
from cluster.rundir import RunDir
from cluster.tiers import open_tiers

SLOT = 64 << 10
NONE = ClusterConfig()
DISK = ClusterConfig(disk_bytes=1 << 20)
BUCKET = ClusterConfig(s3_bytes=1 << 20)
BOTH = ClusterConfig(disk_bytes=1 << 20, s3_bytes=1 << 20)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (NONE, []),
        (DISK, ["disk"]),
        pytest.param(BUCKET, ["s3"], marks=pytest.mark.slow),
        pytest.param(BOTH, ["disk", "s3"], marks=pytest.mark.slow),
    ],
)
def test_each_tier_that_is_asked_for_is_opened_though_it_is_empty(
    config: ClusterConfig, names: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if config.s3_bytes:
        make: Callable[[], str] = request.getfixturevalue("s3_url")
        config = msgspec.structs.replace(config, s3_url=make())

    async def main() -> None:
        tier, stats = await open_tiers(config, RunDir(tmp_path), "store-0", SLOT)
        assert [part.name for part in (tier.parts if tier is not None else ())] == names
        assert set(names) <= set(stats)
        if tier is not None:
            tier.close()

    asyncio.run(main())
