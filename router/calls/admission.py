"""How many calls may be in progress at once. Pure."""

from collections.abc import Generator
from contextlib import contextmanager

from router.calls.errors import unavailable


class Admission:
    """Counts calls in progress, ``requests_max`` of them at most."""

    def __init__(self, requests_max: int) -> None:
        self._requests_max = requests_max
        self.active = 0
        """Calls in progress."""

    @contextmanager
    def admitted(self) -> Generator[None, None, None]:
        """One call, from before its body is read to after its answer.

        Raises:
            CallFailed: there are too many.
        """
        if self.active >= self._requests_max:
            raise unavailable("too many requests are in progress", "overloaded")
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def went_on(self) -> None:
        """What a call began runs on after it; :meth:`over` follows. It was admitted before."""
        self.active += 1

    def over(self) -> None:
        """That is over."""
        self.active -= 1
