"""Whether a peer that failed is worth asking. Pure."""


class Breaker:
    """Opens after ``failures_max`` failures in a row; then the peer is left alone, each time for twice as long.

    What closes it is an attempt of its own, made after the pause; the pause is short again when the peer has also
    answered after that.
    """

    def __init__(self, failures_max: int, pause_s: float, pause_max_s: float) -> None:
        assert failures_max > 0
        assert 0 < pause_s <= pause_max_s
        self._failures_max = failures_max
        self._pause_min_s = pause_s
        self._pause_max_s = pause_max_s
        self._failures = 0
        self.open = False
        self.pause_s = pause_s
        """How long to leave it alone before the next attempt, while it is open."""

    def failed(self, *, final: bool = False) -> bool:
        """The peer failed, for good if it said so; returns whether that opened it."""
        if self.open:
            return False  # what was under way when it opened
        self._failures += 1
        self.open = final or self._failures >= self._failures_max
        return self.open

    def answered(self) -> None:
        """The peer answered: failures were not in a row."""
        if not self.open:
            self._failures = 0
            self.pause_s = self._pause_min_s

    def still_failing(self) -> None:
        """The attempt after a pause failed, too."""
        assert self.open
        self.pause_s = min(2 * self.pause_s, self._pause_max_s)

    def close(self) -> None:
        """The attempt after a pause succeeded."""
        if self.open:
            self.open = False
            self._failures = 0
            self.pause_s = min(2 * self.pause_s, self._pause_max_s)
