"""A step runs where it can be done, and goes on only where the answer stays what it would have been."""

from typing import Any

import msgspec
import pytest

from router.fleet.load import Key, Warm, WorkerTable
from router.policy.feasible import NOTHING, Needs, can, needs_of, refusal, unable
from router.policy.placement import Ask, Policy, place
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.errors import CannotContinue, InvalidRequest
from tracehaul.wire.ids import Generation, NodeId, TraceId
from tracehaul.wire.steps import Constraint, Sampling

GRAMMAR = Constraint("regex", "[a-z]+")
FULL = ("constraints", "prompt_logprobs", "recall")
MANY = 100_000
CONTINUING = ("seeds", "penalties", "constraints")


def worker(name: str, features: Any = FULL, lacks: Any = ()) -> NodeInfo:
    return NodeInfo(NodeId(name), Generation(1), "decode", f"{name}:1", model="m", features=features, lacks=lacks)


NATIVE, STOCK = worker("native"), worker("stock", lacks=(*CONTINUING, "tails", "of a later version"))


@pytest.mark.parametrize(
    ("sampling", "began", "needs"),
    [
        (Sampling(4), False, NOTHING),
        (Sampling(4, seeded=False), True, NOTHING),
        (Sampling(4, temperature=0.0), True, NOTHING),
        (Sampling(4), True, Needs((), ("seeds",))),
        (Sampling(4, temperature=0.0, repetition_penalty=1.1), True, Needs((), ("penalties",))),
        (Sampling(4, temperature=0.0, presence_penalty=0.1), False, NOTHING),
        (Sampling(4, temperature=0.0, constraint=GRAMMAR), False, Needs(("constraints",))),
        (Sampling(4, temperature=0.0, constraint=GRAMMAR), True, Needs(("constraints",), ("constraints",))),
    ],
)
def test_what_a_step_takes_depends_on_how_it_is_sampled_and_whether_it_has_begun(
    sampling: Sampling, began: bool, needs: Needs
) -> None:
    assert needs_of(sampling, scores=False, began=began) == needs
    assert can(NATIVE, needs)
    assert can(STOCK, needs) == (not needs.continues)


def test_a_prompt_is_scored_by_who_can() -> None:
    needs = needs_of(Sampling(1), scores=True, began=False)
    plain = worker("plain", ("constraints",))
    assert unable([NATIVE, plain, STOCK], needs) == {Key(plain.node, plain.generation)}
    assert refusal([plain, NATIVE], needs) is None
    refused = refusal([plain], needs)
    assert isinstance(refused, InvalidRequest)
    assert str(refused) == "no worker of 'm' tells how likely a prompt's tokens are"


def test_an_answer_that_cannot_go_on_as_it_would_have_ends_aloud() -> None:
    needs = needs_of(Sampling(4, presence_penalty=1.0), scores=False, began=True)
    assert refusal([STOCK, NATIVE], needs) is None
    assert unable([STOCK, NATIVE], needs) == {Key(STOCK.node, STOCK.generation)}
    refused = refusal([STOCK], needs)
    assert isinstance(refused, CannotContinue)
    assert "with the seed that was asked for and with penalties on what was said" in str(refused)
    assert refused.retriable
    assert refusal([], needs) is None


def test_who_takes_nothing_special_is_compared_with_nobody() -> None:
    assert unable([worker("bare", ())], NOTHING) == frozenset()


def test_who_cannot_do_a_step_is_not_given_it_whatever_else_speaks_for_it() -> None:
    decodes = WorkerTable()
    workers = [worker("a"), worker("b"), worker("c")]
    decodes.sync(workers, [NodeLoad(free_tokens=MANY) for _ in workers])
    a, b, c = (Key(info.node, info.generation) for info in workers)
    ask = Ask(TraceId("t"), prompt_tokens=4000, stored=(), warm=Warm(*a, 4000), home=None)
    policies: tuple[Policy, ...] = ("cost", "sticky", "round-robin")
    for policy in policies:
        at_b = msgspec.structs.replace(ask, unable=frozenset((a, c)), asked=a.node, avoided=frozenset((b,)))
        placed = place(policy, at_b, decodes, WorkerTable(), [], 0.0)
        assert placed is not None
        assert placed.decode == b
        nowhere = msgspec.structs.replace(ask, unable=frozenset((a, b, c)))
        assert place(policy, nowhere, decodes, WorkerTable(), [], 0.0) is None
    left = place("cost", msgspec.structs.replace(ask, unable=frozenset((a,))), decodes, WorkerTable(), [], 0.0)
    assert left is not None
    assert left.reason == "its worker cannot do it"
