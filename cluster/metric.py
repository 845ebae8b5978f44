"""One metric, as it is named and told."""

from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge"]


class Metric(NamedTuple):
    """One metric. A counter's name ends with ``_total`` on the page."""

    name: str
    """Without ``_total``; what is counted, or the unit, comes last where the name is not older than this rule."""
    unit: str
    help: str
    labels: tuple[str, ...] = ()
