"""What keeps answers to their constraints."""

from collections.abc import Sequence

from tracehaul.engine.base import Engine, Guide
from tracehaul.runtime import deadline
from tracehaul.wire.steps import Sampling


async def guide_of(engine: Engine, sampling: Sampling, output: Sequence[int], deadline_s: float | None) -> Guide | None:
    """What keeps the answer that begins with ``output`` to its constraint; None if it has none.

    Raises:
        InvalidRequest: the constraint cannot be used here.
        DeadlineExceeded: the deadline has passed.
    """
    if sampling.constraint is None:
        return None
    async with deadline.until(deadline_s):
        return await engine.guide(sampling.constraint, output)
