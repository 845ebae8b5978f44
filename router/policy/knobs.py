"""What of placing can be turned while a fleet runs. Pure."""

from typing import Annotated

import msgspec
from msgspec import Meta

Share = Annotated[float, Meta(ge=0, le=1)]


class Knobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One setting of all of them."""

    sticky_margin: Share = 0.15
    """Share of its cost that another worker must save before a trace leaves the one that has its context."""
    pull_margin: Share = 0.85
    """Share of the cost at most at which computing is chosen over pulling: estimates are no better."""
    local_margin: Share = 0.7
    """A decode worker computes more than a short rest itself only if that takes at most this share of what a prefill
    worker's help takes: what it computes delays steps that nobody knows of yet, too."""


DEFAULT = Knobs()
