"""A worker's first rates: measured once for all that are alike on a host, and for a while."""

from pathlib import Path
from typing import cast

import msgspec
import pytest

from kvstore.client.client import StoreClient
from sim import loop as virtual
from tracehaul.engine.fake import EngineCost, FakeEngine, fake_info
from tracehaul.runtime import clock, kept
from tracehaul.runtime.offload import InlineOffload
from worker import calibration
from worker.calibration import calibrate
from worker.config import WorkerConfig
from worker.host import WorkerHost
from worker.rates import ASSUMED, Rates

SLOW, FAST = (EngineCost(iteration_s=0.004, prefill_token_s=token_s) for token_s in (2e-3, 1e-3))


def start(folder: Path, cost: EngineCost, hardware: str = "a processor") -> tuple[Rates, float]:
    """A worker's rates at its start, and how long they took."""
    engine = FakeEngine(msgspec.structs.replace(fake_info(), hardware=hardware), cost)
    host = WorkerHost(engine, cast(StoreClient, None), WorkerConfig())

    async def run() -> float:
        began_s = clock.now_s()
        await calibrate(host, folder, InlineOffload())
        return clock.now_s() - began_s

    took_s = virtual.run(run)
    assert engine.free_tokens == engine.info.kv_tokens_max
    return host.loop.meter.rates, took_s


def test_the_next_worker_of_its_kind_measures_nothing(tmp_path: Path) -> None:
    rates, took_s = start(tmp_path, SLOW)
    assert rates.token_s == pytest.approx(2e-3, rel=0.2)
    assert rates.decode_s == pytest.approx(0.004)
    assert took_s == pytest.approx(129 * 2e-3 + 3 * 0.004, rel=0.02)
    assert start(tmp_path, FAST) == (rates, 0.0)


def test_another_kind_of_worker_measures_for_itself(tmp_path: Path) -> None:
    slow, _ = start(tmp_path, SLOW)
    fast, _ = start(tmp_path, FAST, hardware="another processor")
    assert fast.token_s < 0.6 * slow.token_s
    assert start(tmp_path, SLOW, hardware="another processor") == (fast, 0.0)


def test_who_does_not_know_its_hardware_keeps_nothing(tmp_path: Path) -> None:
    for cost in (SLOW, FAST):
        rates, _ = start(tmp_path, cost, hardware="")
        assert rates.token_s == pytest.approx(cost.prefill_token_s, rel=0.2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("passed_s", [calibration.KEPT_S + 1, -10.0])
def test_it_is_not_believed_for_ever(passed_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, _ = start(tmp_path, SLOW)
    wall_s = clock.wall_s
    monkeypatch.setattr(calibration.clock, "wall_s", lambda: wall_s() + passed_s)
    fast, took_s = start(tmp_path, FAST)
    assert fast.token_s < 0.6 * slow.token_s
    assert took_s > 0
    assert start(tmp_path, SLOW) == (fast, 0.0)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"when_s": 0, "iterations": [[-1]]}', None])
def test_what_is_damaged_is_measured_anew(content: bytes | None, tmp_path: Path) -> None:
    start(tmp_path, SLOW)
    (file,) = (path for path in tmp_path.iterdir() if path.name != "lock")
    if content is None:
        file.write_bytes(file.read_bytes()[:-1])
    else:
        kept.write(file, [content])
    fast, took_s = start(tmp_path, FAST)
    assert took_s > 0
    assert start(tmp_path, SLOW) == (fast, 0.0)


def test_where_nothing_can_be_kept_each_measures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    for cost in (SLOW, FAST):
        rates, _ = start(tmp_path / "file" / "rates", cost)
        assert rates.token_s == pytest.approx(cost.prefill_token_s, rel=0.2)
    assert "calibrations are not kept" in caplog.text


def test_who_waits_too_long_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "WAIT_S", 0.1)
    with kept.alone(tmp_path / "lock", 0.0) as is_ours:
        assert is_ours
        rates, _ = start(tmp_path, SLOW)
    assert rates.token_s == pytest.approx(2e-3, rel=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_it_says_what_it_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    start(tmp_path, SLOW)
    start(tmp_path, SLOW)
    told = [record.__dict__["tracehaul_fields"] for record in caplog.records if record.message == "calibrated"]
    assert [fields["measured"] for fields in told] == [True, False]
    assert told[0]["token_s"] == told[1]["token_s"] != ASSUMED.token_s
