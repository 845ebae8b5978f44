"""Who answers lines."""

from typing import Protocol

from jobs.lines import Call
from jobs.retries import Answer, NoAnswer


class Asker(Protocol):
    """Answers calls, whatever is behind it."""

    async def ask(self, call: Call, timeout_s: float, *, urgent: bool) -> Answer | NoAnswer:
        """What it is answered within that time; ``urgent``: whatever else runs. Raises nothing but bugs; cancelled, it
        ends what it began."""
        ...
