"""How soon a call's steps should run, and by when they must have ended. Pure."""

from typing import Literal

import msgspec

StepClass = Literal["interactive", "standard", "background"]


class Urgency(msgspec.Struct, frozen=True):
    """Of one call; steps do not carry it yet."""

    step_class: StepClass = "standard"
    priority: int = 0
    """Among steps of one class; higher goes first."""
    deadline_s: float | None = None
    """When it ends, by this process's clock, whatever it has by then."""
