"""Which tiers a config opens."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cluster.config import ClusterConfig, disk_path
from cluster.rundir import RunDir
from cluster.tiers import open_backing

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
        backing = await open_backing(config, RunDir(tmp_path), "store-0", SLOT)
        assert [part.name for part in (backing.tier.parts if backing is not None else ())] == names
        if backing is not None:
            assert backing.journal is not None
            await backing.journal.aclose()
            backing.tier.close()

    asyncio.run(main())


def test_a_disk_is_closed_if_what_belongs_beside_it_cannot_be_had(tmp_path: Path) -> None:
    async def main() -> None:
        run = RunDir(tmp_path)
        pins = disk_path(DISK, run, "store-0").with_suffix(".pins")
        pins.mkdir(parents=True)
        with pytest.raises(IsADirectoryError):
            await open_backing(DISK, run, "store-0", SLOT)
        pins.rmdir()
        backing = await open_backing(DISK, run, "store-0", SLOT)  # nobody has the lock on the file
        assert backing is not None
        assert backing.journal is not None
        await backing.journal.aclose()
        backing.tier.close()

    asyncio.run(main())
