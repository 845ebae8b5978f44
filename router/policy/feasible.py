"""Which workers can do a step at all, before any is priced. Pure.

What an engine lacks is announced (:class:`tracehaul.wire.cluster.NodeInfo`). A step whose answer has begun goes on only
where what follows would be what its lost worker would have said, or is as likely: a drawn seed is no promise, one that
the client has said is. Elsewhere it ends with an error, rather than with an answer that silently differs.
"""

from collections.abc import Sequence
from typing import NamedTuple

from router.fleet.load import Key
from tracehaul.wire.cluster import Feature, Lack, NodeInfo
from tracehaul.wire.errors import CannotContinue, ClusterError, InvalidRequest
from tracehaul.wire.steps import Sampling

_FEATURES: dict[str, str] = {
    "constraints": "keeps an answer to a schema or a grammar",
    "prompt_logprobs": "tells how likely a prompt's tokens are",
}
_LACKS: dict[str, str] = {
    "seeds": "with the seed that was asked for",
    "penalties": "with penalties on what was said",
    "constraints": "within its schema or grammar",
}


class Needs(NamedTuple):
    """What a step takes beside computing tokens; nothing for most."""

    features: tuple[Feature, ...] = ()
    continues: tuple[Lack, ...] = ()
    """What must not be lacking."""


NOTHING = Needs()


def needs_of(sampling: Sampling, *, scores: bool, began: bool) -> Needs:
    """What a step takes that is sampled so.

    Args:
        sampling: of the step.
        scores: its prompt's tokens are to be told, how likely they are.
        began: tokens of its answer were told already.
    """
    constrained = sampling.constraint is not None
    if not (constrained or scores or began):
        return NOTHING
    features: list[Feature] = ["constraints"] if constrained else []
    if scores:
        features.append("prompt_logprobs")
    continues: list[Lack] = []
    if began and sampling.temperature > 0 and sampling.seeded:
        continues.append("seeds")
    if began and sampling.penalizes:
        continues.append("penalties")
    if began and constrained:
        continues.append("constraints")
    return Needs(tuple(features), tuple(continues))


def can(info: NodeInfo, needs: Needs) -> bool:
    """Whether that worker can do such a step."""
    return all(feature in info.features for feature in needs.features) and not any(
        lack in info.lacks for lack in needs.continues
    )


def unable(workers: Sequence[NodeInfo], needs: Needs) -> frozenset[Key]:
    """Those that cannot do it."""
    if needs == NOTHING:
        return frozenset()
    return frozenset(Key(info.node, info.generation) for info in workers if not can(info, needs))


def refusal(workers: Sequence[NodeInfo], needs: Needs) -> ClusterError | None:
    """What a step ends with that none of these can do, which are all there are; None if one can."""
    if not workers or any(can(info, needs) for info in workers):
        return None
    model = workers[0].model
    for feature in needs.features:
        if not any(feature in info.features for info in workers):
            return InvalidRequest(f"no worker of {model!r} {_FEATURES[feature]}")
    what = " and ".join(_LACKS[lack] for lack in needs.continues if any(lack in info.lacks for info in workers))
    return CannotContinue(
        f"the worker was lost in the middle of the answer, and no other of {model!r} can continue it {what}: ask again"
    )
