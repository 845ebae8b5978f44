"""One pool's workers, as dispatching sees them."""

from collections.abc import Callable

from router.dispatch.predicted import Predicted
from router.dispatch.relief import Relief
from router.dispatch.run import Run
from router.fleet.load import Key, WorkerTable
from router.policy.cost import OutputLengths
from router.policy.knobs import DEFAULT, Knobs
from router.policy.placement import Placement


class Books:
    """What was sent to them."""

    def __init__(self) -> None:
        self.decodes = WorkerTable()
        self.prefills = WorkerTable()


class Pooled:
    """Two books: workers give way to what is in front, so that for a step there nothing of the background counts.
    ``price`` and ``predicted`` as in :class:`Relief`."""

    def __init__(self, predicted: Predicted, price: Callable[[Run, Key], Placement | None]) -> None:
        self.all = Books()
        self.front = Books()
        """Without the background."""
        self.knobs: Knobs = DEFAULT
        self.outputs = OutputLengths()
        self.relief = Relief((self.front.prefills, self.front.decodes), predicted, price)

    def seen_by(self, run: Run) -> Books:
        """What counts for that step."""
        return self.all if run.background else self.front

    def entered_by(self, run: Run) -> tuple[Books, ...]:
        """Where that step is entered."""
        return (self.all,) if run.background else (self.all, self.front)
