"""A whole cluster's decisions under faults, written down and made anew."""

from typing import Any

import msgspec
import pytest

from router.dispatch.pricing import Pricing
from router.policy.hindsight import Priced, through
from sim.run import simulate
from sim.shape import MIX


@pytest.mark.parametrize("seed", [21, 34])
def test_what_routers_write_down_is_enough_to_choose_the_same_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[bytes] = []
    begin = Pricing.__init__

    def telling(self: Pricing, *args: Any, **more: Any) -> None:
        begin(self, *args, **more)
        self.told = lambda _, one: log.append(msgspec.json.encode(one))

    monkeypatch.setattr(Pricing, "__init__", telling)
    result = simulate(seed, mix=MIX)
    assert not result.findings
    decisions = [("", msgspec.json.decode(line, type=Priced)) for line in log]
    redone = through(decisions, "cost", {})
    assert len(redone) == len(decisions) >= result.finished
    assert all(one.again for one in redone)
    assert len({one.ask.output_tokens for _, one in decisions}) > 1, "what steps generate is learned"
    assert max(map(len, log)) < 4096, "a decision takes little"
