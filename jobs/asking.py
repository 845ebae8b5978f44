"""Who answers lines."""

from typing import Protocol

from jobs.lines import Call
from jobs.retries import Answer, NoAnswer


class Asker(Protocol):
    """Answers calls, whatever is behind it."""

    async def ask(self, call: Call, timeout_s: float) -> Answer | NoAnswer:
        """What it is answered within that time. Raises nothing but bugs; cancelled, it ends what it began."""
        ...
