"""The router's loop on a simulated fleet: with the splits that are left alone."""

from bench.adapt import phases
from bench.adapt.phases import run
from router.adapt.loop import AdaptConfig, Change


def test_a_fleet_with_too_many_prefill_workers_comes_to_do_as_much_as_one_with_few(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(phases, "MIXES", {"answers": phases.MIXES["answers"]})
    few, many = run(1, 0.5, 1), run(4, 0.5, 1)
    assert many.whole < 0.8 * few.whole, "else there is nothing to gain"
    ours = run(4, 0.5, 1, AdaptConfig(enabled=True))
    assert ours.whole > 1.1 * many.whole
    changes = [one for _, one in ours.told if isinstance(one, Change)]
    assert {change.role for change in changes if change.undoes is None} == {"decode"}
