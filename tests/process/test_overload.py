"""Four times the agents of a live fleet: traces that may not begin are told when, those that were let in go on."""

import asyncio
from pathlib import Path

from bench.common.fake_machine import fleet
from bench.overload.__main__ import KV_TOKENS, measure
from router.policy.admission import AdmissionConfig


async def overloaded(folder: Path) -> dict[str, float]:
    async with fleet(folder, AdmissionConfig(), KV_TOKENS) as url:
        return {result.name: result.value for result in await measure(url, 8.0, 16.0)}


def test_nothing_is_lost_and_no_later_step_is_refused(tmp_path: Path) -> None:
    figures = asyncio.run(overloaded(tmp_path))
    assert figures["overload.lost"] == 0
    assert figures["overload.refused"] > 0
    assert figures["overload.steps"] > 0
