"""One pool's workers, as dispatching sees them."""

from collections.abc import Callable

from router.dispatch.predicted import Predicted
from router.dispatch.relief import Relief
from router.dispatch.run import Run
from router.fleet.load import Key, WorkerTable
from router.policy.placement import Placement


class Pooled:
    """The books on what was sent to them; ``price`` and ``predicted`` as in :class:`Relief`."""

    def __init__(self, predicted: Predicted, price: Callable[[Run, Key], Placement | None]) -> None:
        self.decodes = WorkerTable()
        self.prefills = WorkerTable()
        self.relief = Relief(self.prefills, predicted, price)
