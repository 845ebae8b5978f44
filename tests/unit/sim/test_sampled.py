"""The checker of tokens that are sampled again."""

from sim import checker
from sim.checker import Findings, SampledChecker


def found(*events: tuple[str, int], router: str = "a") -> list[str]:
    """What it says of a step that is told by life ``a``."""
    findings = Findings()
    books = SampledChecker(findings)
    for what, tokens in events:
        if what == "has":
            books.received("s", "a", tokens)
        else:
            books.asked("s", router, tokens)
    return findings.lines


def test_a_token_that_a_client_has_is_not_asked_for_again(monkeypatch) -> None:
    monkeypatch.setattr(checker.clock, "now_s", lambda: 0.0)
    assert found(("has", 3), ("asked", 3), ("has", 5), ("asked", 6)) == []
    (line,) = found(("has", 3), ("asked", 2))
    assert "sampled: s: asked for token 3" in line
    assert len(found(("has", 3), ("has", 1), ("asked", 2))) == 1, "a call that is told from its beginning"


def test_what_another_life_of_the_router_told_may_be(monkeypatch) -> None:
    monkeypatch.setattr(checker.clock, "now_s", lambda: 0.0)
    assert found(("has", 3), ("asked", 0), router="b") == []
