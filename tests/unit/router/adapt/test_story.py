"""What operators read of changes."""

from router.adapt.loop import Change, Verdict
from router.adapt.story import Noted, story
from tracehaul.wire.ids import NodeId

P0 = NodeId("prefill-0")
INPUTS = {"prefills": 2.0, "decodes": 2.0, "rate": 5.25, "in_time": 0.9, "step_s": 3.0, "prompt_s": 0.1, "output": 120}


def test_a_change_its_verdict_and_its_taking_back_are_told_in_order() -> None:
    noted = [
        Noted(100.0, "", Change(1, P0, "decode", 0.25, False, INPUTS)),
        Noted(104.0, "", Change(9, NodeId("other"), "decode", 0.25, False, INPUTS)),
        Noted(120.0, "", Verdict(1, P0, "in vain", "less is done", 0.25, -0.1, 0.02, (3.0, 3.4))),
        Noted(120.0, "", Change(2, P0, "prefill", 0.0, False, {}, undoes=1)),
        Noted(121.0, "", Verdict(2, P0, "refused", "a role has changed")),
    ]
    assert story(noted, "prefill-0", 130.0) == [
        "  30.0 s ago  #1: prefill-0 is to be a decode worker: 25 % more done is expected, where 2 prefill and 2 "
        "decode workers end 5.25 steps a second, 90 % of them in time, each of 3.0 s with 100 ms of prompt and 120 "
        "tokens of answer.",
        "  10.0 s ago  #1 was in vain: less is done (-10 % more done, give or take 2 %, where 25 % was foretold; a "
        "step takes 3.4 s instead of 3.0 s).",
        "  10.0 s ago  #2: prefill-0 is to be a prefill worker again: #1 was in vain.",
        "   9.0 s ago  #2 was not done: a role has changed.",
    ]
    assert story(noted, "decode-7", 130.0) == []


def test_what_is_but_hoped_for_is_told_as_such() -> None:
    (line,) = story([Noted(100.0, "", Change(1, P0, "decode", 0.25, False, INPUTS, hoped=True))], "prefill-0", 130.0)
    assert "25 % more done is hoped for, where 2 prefill" in line
