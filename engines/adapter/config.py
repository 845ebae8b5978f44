"""What an operator may set on a worker whose steps a stock server computes."""

from typing import Annotated

import msgspec
from msgspec import Meta

Seconds = Annotated[float, Meta(gt=0)]


class AdapterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of every wait for the server."""

    poll_s: Seconds = 1.0
    """How often it is asked whether it lives, and what its load is."""
    answer_timeout_s: Seconds = 5.0
    """Longest wait for that answer: then it is taken for lost, and its steps go on elsewhere."""
    stall_timeout_s: Seconds = 60.0
    """Longest wait for its own check that it still computes, where it has one: a long prompt delays that."""
    silence_timeout_s: Seconds = 120.0
    """Longest wait for a step's next token, while the server answers otherwise."""
    stored_timeout_s: Seconds = 5.0
    """Longest wait until the store has the blocks of a prompt that was computed."""
    down_timeout_s: Seconds = 30.0
    """A server that was started by its worker and is lost for so long is ended, and its worker with it."""
    start_timeout_s: Seconds = 600.0
    """From its start until it answers."""
    stop_timeout_s: Seconds = 5.0
    """What it may take to end when told to; then it is killed."""
