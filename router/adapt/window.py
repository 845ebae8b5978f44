"""What a pool did of late, second by second. Pure."""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

KEPT_S = 256
"""Seconds that are remembered."""
RATIOS_MAX = 16
"""Of one second: how close to their deadlines steps came."""
PLAIN = 2.0
"""Standard errors that make it plain."""
STEADY = 1.25
"""The work is on the way to be another where it is by so much."""
OTHER_WORK = 1.5
"""The work is another where a step has so many times as many new tokens, or generates as many, or a part of it."""


class Ended(NamedTuple):
    """A step has ended well."""

    new_tokens: int
    """Of its prompt, those that its trace had not had."""
    output_tokens: int
    seconds: float
    deadline_s: float | None
    """What it had; None: as long as it took."""


@dataclass
class _Second:
    number: int
    steps: int = 0
    in_time: int = 0
    new: int = 0
    output: int = 0
    new_squares: int = 0
    output_squares: int = 0
    step_s: float = 0.0
    prompt_s: float = 0.0
    gap_s: float = 0.0
    gaps: int = 0
    missed: int = 0
    ratios: list[float] = field(default_factory=list[float])


class Work(NamedTuple):
    """A stretch of time. Means are of a step."""

    seconds: int
    steps: int
    """Those that met their deadlines, or had none."""
    ended: int
    """All that ended well, or too late."""
    rate: float
    """As many per second: the objective."""
    error: float
    """Standard error of that."""
    new: float
    output: float
    step_s: float
    prompt_s: float
    """Computing of its prompt, as expected when it was placed."""
    gap_s: float
    """Between two steps of a trace."""
    new_error: float
    """Standard error of ``new``, by which it may be another by chance; and of ``output``."""
    output_error: float
    ratios: tuple[float, ...]
    """Seconds of steps as shares of what they had; those without a deadline are left out."""


class Window:
    """The last seconds."""

    def __init__(self) -> None:
        self._seconds: deque[_Second] = deque(maxlen=KEPT_S)

    def placed(self, now_s: float, prompt_s: float, gap_s: float | None) -> None:
        """A step was, whose prompt is expected to take so much computing, so long after its trace's last one."""
        second = self._now(now_s)
        second.prompt_s += prompt_s
        if gap_s is not None:
            second.gap_s += gap_s
            second.gaps += 1

    def ended(self, now_s: float, step: Ended) -> None:
        """A step has."""
        second = self._now(now_s)
        second.new += step.new_tokens
        second.output += step.output_tokens
        second.new_squares += step.new_tokens**2
        second.output_squares += step.output_tokens**2
        second.step_s += step.seconds
        second.steps += 1
        if step.deadline_s is not None and len(second.ratios) < RATIOS_MAX:
            second.ratios.append(step.seconds / max(step.deadline_s, 1e-3))
        if step.deadline_s is None or step.seconds <= step.deadline_s:
            second.in_time += 1

    def missed(self, now_s: float) -> None:
        """A step ended at its deadline, or failed."""
        self._now(now_s).missed += 1

    def any_missed(self, since_s: float, until_s: float) -> bool:
        """Whether any step did between."""
        return any(second.missed for second in self._seconds if since_s <= second.number < until_s)

    def over(self, since_s: float, until_s: float) -> Work | None:
        """Whole seconds between; None if there are less than two, or nothing ended in them."""
        first, last = math.ceil(since_s), math.floor(until_s) - 1
        found = [second for second in self._seconds if first <= second.number <= last]
        seconds = last - first + 1
        steps = sum(second.steps for second in found)
        if seconds < 2 or not steps:
            return None
        rates = [second.in_time for second in found]
        rate = sum(rates) / seconds
        spread = sum((one - rate) ** 2 for one in rates) + (seconds - len(found)) * rate**2
        ratios = [ratio for second in found for ratio in second.ratios]
        ratios += [2.0] * sum(second.missed for second in found)
        return Work(
            seconds,
            sum(second.in_time for second in found),
            steps,
            rate,
            math.sqrt(spread / (seconds - 1) / seconds),
            sum(second.new for second in found) / steps,
            sum(second.output for second in found) / steps,
            sum(second.step_s for second in found) / steps,
            sum(second.prompt_s for second in found) / steps,
            sum(second.gap_s for second in found) / max(1, sum(second.gaps for second in found)),
            _error(steps, sum(second.new for second in found), sum(second.new_squares for second in found)),
            _error(steps, sum(second.output for second in found), sum(second.output_squares for second in found)),
            tuple(ratios),
        )

    def steady(self, since_s: float, until_s: float) -> bool:
        """Whether the work was the same all the time."""
        half_s = (since_s + until_s) / 2
        first, second = self.over(since_s, half_s), self.over(half_s, until_s)
        return first is not None and second is not None and not another(first, second, STEADY)

    def reaching_back(self, work: Work, since_s: float, until_s: float, by_s: float, earliest_s: float) -> Work:
        """The same over a longer time, where the work was the same before: what is changed where less was done by
        chance would seem to help.
        """
        while since_s - by_s >= earliest_s:
            earlier = self.over(since_s - by_s, since_s)
            if earlier is None or another(earlier, work, STEADY):
                break
            since_s -= by_s
        return self.over(since_s, until_s) or work

    def _now(self, now_s: float) -> _Second:
        number = math.floor(now_s)
        if not self._seconds or self._seconds[-1].number < number:
            self._seconds.append(_Second(number))
        return self._seconds[-1]


def _error(count: int, total: float, squares: float) -> float:
    """Standard error of a mean."""
    return math.sqrt(max(0.0, squares - total**2 / count) / max(1, count - 1) / count)


def another(before: Work, now: Work, by: float = OTHER_WORK) -> bool:
    """Whether the work is another."""
    new, output = (before.new_error, now.new_error), (before.output_error, now.output_error)
    return _other(before.new, now.new, by, new) or _other(before.output, now.output, by, output)


def gained(before: Work, after: Work) -> tuple[float, float]:
    """Of the objective, as a share of what it was, and its standard error."""
    was = max(before.rate, 1e-9 + 0.01 * after.rate)  # from next to nothing a hundredfold is enough
    return after.rate / was - 1, (before.error + after.error) / was


def _other(before: float, now: float, by: float, errors: tuple[float, float]) -> bool:
    """Whether a mean is another: by more than what a few tokens more or less make, or chance."""
    low, high = sorted((max(1.0, before), max(1.0, now)))
    return high > by * low and high - low > max(16.0, PLAIN * math.hypot(*errors))
