"""A batch that is not over, as it is run, and with what."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from jobs.asking import Asker
from jobs.batch import Batch
from jobs.keeping import Opened
from jobs.lines import Checked, LineError
from jobs.outputs import Outputs
from jobs.runner import Job, Runner


class StillRuns(Exception):
    """It has not ended yet; says which."""


class TooMany(Exception):
    """No more batches are taken; says why."""


class Means(NamedTuple):
    """What batches are run with."""

    runner: Runner
    """Whoever runs batches has it run."""
    asker: Callable[[Batch], Asker]
    """Who answers the lines of that batch."""
    refuse: Callable[[Batch, str], LineError | None]
    """What is wrong with a model's name in that batch, if anything."""
    over: Callable[[Batch], None] = lambda batch: None
    """Hears of each that is over, and of those of before at the beginning."""


class Live:
    """A batch that is not over."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.changing = asyncio.Lock()
        self.interrupted = asyncio.Event()
        """It was cancelled, or its time is over: what is being done for it ends."""
        self.checked: Checked | None = None
        self.opening: asyncio.Task[Opened] | None = None
        self.outputs: Outputs | None = None
        """Once they are open."""
        self.job: Job | None = None
        self.lost = False
        """It is another's by now."""
