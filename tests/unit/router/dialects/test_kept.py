"""What keeps responses: whose they are, and what goes first."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.dialects.responses.answers import MessageItem, OutputText, Response
from router.dialects.responses.kept import Kept, Key, Limits, Turn, chain, items_of
from router.dialects.responses.requests import Item
from router.http.config import ApiConfig


def response(name: str, text: str = "") -> Response:
    output = (MessageItem(f"msg_{name}", (OutputText(text),), "completed"),) if text else ()
    return Response(id=name, created_at=0, model="m", status="completed", output=output)


def keep(kept: Kept, key: Key, text: str, before: Turn | None = None, now_s: float = 0.0) -> Turn | None:
    asked = [Item(role="user", content=text)]
    kept.begin(key, response(key[1]), asked, before, now_s)
    kept.change(key, response(key[1], "a" + text), ended=True)
    entry = kept.get(key, now_s)
    return entry.output if entry is not None else None


def test_the_tenant_that_has_most_loses_its_oldest() -> None:
    kept = Kept(Limits(4, 1 << 30, 10.0))
    keep(kept, ("small", "s"), "x")
    for at in range(4):
        keep(kept, ("large", f"l{at}"), "y" * 100)
    names = [key for key in [("small", "s"), *(("large", f"l{at}") for at in range(4))] if kept.get(key, 0.0)]
    assert names == [("small", "s"), ("large", "l1"), ("large", "l2"), ("large", "l3")]


def test_bytes_are_bounded_and_what_is_shared_counts_once() -> None:
    limits = Limits(1000, 100_000, 10.0)
    kept, before = Kept(limits), None
    for at in range(200):
        before = keep(kept, ("", f"r{at}"), "z" * 3000, before)
        assert kept.nbytes <= limits.nbytes or len(kept) == 0
        if before is None:
            break
    else:
        pytest.fail("a conversation that is longer than all memory was kept")
    assert at > 5


def test_a_long_conversation_costs_its_own_tenant() -> None:
    kept, before = Kept(Limits(1000, 100_000, 10.0)), None
    keep(kept, ("small", "s"), "x" * 9000)
    for at in range(12):
        before = keep(kept, ("large", f"r{at}"), "z" * 3000, before)
        assert kept.get(("small", "s"), 0.0) is not None
    assert kept.get(("large", "r0"), 0.0) is None


def test_the_age_is_bounded() -> None:
    kept = Kept(Limits(10, 1 << 30, 10.0))
    keep(kept, ("", "old"), "x", now_s=1.0)
    keep(kept, ("", "new"), "x", now_s=6.0)
    assert kept.get(("", "old"), 10.9) is not None
    assert kept.get(("", "old"), 11.0) is None
    assert kept.get(("", "new"), 11.0) is not None


def test_a_conversation_is_what_was_said_in_order() -> None:
    kept = Kept(Limits(10, 1 << 30, 10.0))
    first = keep(kept, ("", "one"), "a")
    last = keep(kept, ("", "two"), "b", first)
    kept.drop(("", "one"))
    texts = [item.content for item in items_of(chain(last))]
    assert [part.text for parts in texts for part in parts or () if not isinstance(part, str)] == ["a", "aa", "b", "ab"]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=40))
def test_nothing_is_left_when_all_are_gone(steps: list[tuple[str, int, int, bool]]) -> None:
    kept = Kept(Limits(6, 12_000, 10.0))
    turns: dict[Key, Turn | None] = {}
    for at, (tenant, name, other, goes) in enumerate(steps):
        if goes:
            kept.drop((tenant, f"r{name}"))
            continue
        key = (tenant, f"{at}")
        turns[(tenant, f"r{name}")] = keep(kept, key, "x" * 100 * name, turns.get((tenant, f"r{other}")))
        assert len(kept) <= 6
        assert kept.nbytes <= 12_000
    for key in [(tenant, f"{at}") for at, (tenant, *_) in enumerate(steps)]:
        kept.drop(key)
    assert (len(kept), kept.nbytes) == (0, 0)


def test_limits_are_checked_as_config() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"responses_max": 0}, ApiConfig)
