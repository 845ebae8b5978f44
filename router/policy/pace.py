"""How soon who waits to begin will. Pure.

What is expected: as many traces end in a second as can go at once, divided by how long each of them goes (Little's
law); how many can go at once follows from how many do, and from the share of the memory that these want. Where more go
than that, the first of them end for nobody. What is seen, while some wait, corrects it.
"""

from collections import deque

SEEN = 32
"""Traces that began, or ended, of late."""
KNOWN = 8
"""After so many that ended it is known how traces usually are."""
EXPECTED = 16.0
"""What is expected counts as so many that were seen,"""
GUESSED = 1.0
"""or as so many where no trace has ended yet."""
GUESS_S = 5.0
"""From one to the next, where nothing is known."""
HALF_LIFE_S = 60.0
"""What was wanted so long ago counts for half as much."""


class Pace:
    """Of the traces that one gate lets in. ``full_share``: of the memory, where the gate closes."""

    def __init__(self, full_share: float) -> None:
        self._full_share = full_share
        self.as_of_s = 0.0
        """Until when it has been told."""
        self._going_s = 0.0
        """Sum of the traces that go over time, fading."""
        self._wanted_s = 0.0
        """The same of the share that they want."""
        self._lives_s: deque[float] = deque(maxlen=SEEN)
        """How long those that ended last had gone."""
        self._since_s = 0.0
        """Since when some wait."""
        self._began_s: deque[float] = deque(maxlen=SEEN)
        """When traces did since then."""
        self._ended_s: deque[float] = deque(maxlen=SEEN)

    def passes(self, going: int, wanted: float, now_s: float) -> None:
        """Since then so many went, and wanted such a share of the memory."""
        passed_s = now_s - self.as_of_s
        keep = 2.0 ** (-passed_s / HALF_LIFE_S)
        self._going_s = self._going_s * keep + going * passed_s
        self._wanted_s = self._wanted_s * keep + wanted * passed_s
        self.as_of_s = now_s

    def usual_share(self, going: int) -> float:
        """Of the memory, what so many want that are as far as traces of late are on average; 0: few have ended yet."""
        if len(self._lives_s) < KNOWN or self._going_s <= 0:
            return 0.0
        return going * self._wanted_s / self._going_s

    def waits(self, now_s: float) -> None:
        """Somebody does now, and nobody did before."""
        self._since_s = now_s
        self._began_s.clear()
        self._ended_s.clear()

    def began(self, now_s: float) -> None:
        """A trace did, while others wait."""
        self._began_s.append(now_s)

    def ended(self, lived_s: float, now_s: float) -> None:
        """A trace did, so long after it was let in."""
        self._lives_s.append(lived_s)
        self._ended_s.append(now_s)

    def start_s(self, before: int, going: int, now_s: float) -> float:
        """In how many seconds one begins that waits behind so many."""
        expected_s, weight, more = GUESS_S, GUESSED, 0.0
        if self._lives_s and self._wanted_s > 0 and self._going_s > 0:
            most = max(1.0, self._going_s * self._full_share / self._wanted_s)
            expected_s, weight = sum(self._lives_s) / len(self._lives_s) / most, EXPECTED
            more = max(0.0, going - most)
        # Traces whose end nobody tells are only seen to begin; and where too many go, they are only seen to end.
        return (more + before + 1) * min(
            (weight * expected_s + now_s - (seen[0] if len(seen) == SEEN else self._since_s)) / (weight + len(seen))
            for seen in (self._began_s, self._ended_s)
        )
