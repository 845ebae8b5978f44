"""Corruptions of every kind through a real node, file and client: all found. ``python -m bench.faults.corruption``
injects ten thousand."""

import asyncio
from pathlib import Path

import pytest

from bench.faults.corruption import KINDS, Count, Injector
from kvstore.client.reader import Reader
from kvstore.tiers import slot_tier


def inject(folder: Path, each: int) -> dict[str, Count]:
    injector = Injector(folder, seed=7)
    asyncio.run(injector.run(dict.fromkeys(KINDS, each)))
    return injector.counts


def test_every_corruption_is_found_and_none_is_served(tmp_path: Path) -> None:
    for kind, count in inject(tmp_path, 100).items():
        assert count.injected >= 100, kind
        assert (count.found, count.served, count.refused) == (count.injected, 0, 0), kind


def test_a_reader_that_trusts_what_lands_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def trust(self, view, way, reads, results, expires_s):  # pyright: ignore
        await self._read(view, way, reads, expires_s)
        for read in reads:
            results[read.wanted.place] = read.block.size_bytes

    monkeypatch.setattr(Reader, "_land", trust)
    injector = Injector(tmp_path, seed=7)
    with pytest.raises(AssertionError, match="what readers found"):
        asyncio.run(injector.run(dict.fromkeys(KINDS, 20)))
    assert injector.counts["memory"].served > 0


def test_a_tier_that_trusts_its_file_does_not_get_wrong_bytes_past_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checks stand between a bad disk and an engine: with the tier's gone the reader's remains."""

    def trust(self, reads):  # pyright: ignore
        self._device.read([read.slot for read in reads], [read.view for read in reads])
        return [read.block.checksum for read in reads]

    monkeypatch.setattr(slot_tier.SlotTier, "_read", trust)
    injector = Injector(tmp_path, seed=7)
    asyncio.run(injector.run({**dict.fromkeys(KINDS, 0), "slots": 40}))
    count = injector.counts["slots"]
    assert (count.found, count.served, count.refused) == (count.injected, 0, 0)
