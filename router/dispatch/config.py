"""What an operator may set on dispatching."""

from typing import Annotated

import msgspec
from msgspec import Meta

from router.adapt.loop import AdaptConfig
from router.fleet.flips import FlipConfig
from router.policy.admission import AdmissionConfig
from router.policy.placement import Policy
from router.policy.prices import Tariff
from router.policy.retention import RetentionConfig


class DispatchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator may set on the router's dispatching."""

    traces_max: Annotated[int, Meta(ge=1)] = 10_000
    """Traces remembered."""
    traces_bytes_max: Annotated[int, Meta(ge=0)] = 768 * 2**20
    """Memory for all that is known of them: texts, tokens, block hashes, steps and decisions, 10 bytes a token. Of a
    trace that is forgotten the next step is tokenized and hashed anew, and nobody can say what was lost of it."""
    answers_bytes_max: Annotated[int, Meta(ge=0)] = 256 * 2**20
    """Disk for what their models answered, which a restarted router goes on from: some kilobytes a step. 0: none is
    kept."""
    answers_max: Annotated[int, Meta(ge=1)] = 100_000
    """Answers kept there; where there are more, or they take more, those of the traces that have rested longest go."""
    policy: Policy = "cost"
    """How decode workers are chosen; ``sticky`` and ``round-robin`` are there to compare with."""
    use_store: bool = True
    """Without it no step reads the store or leaves anything there, and decode workers compute all that they lack:
    to compare with, too."""
    attempts_max: Annotated[int, Meta(ge=1)] = 4
    """Workers tried in a row without a new token before a step fails."""
    retry_pause_s: Annotated[float, Meta(ge=0)] = 0.2
    """Pause before the next attempt: membership needs a moment to notice a death."""
    retention: RetentionConfig = RetentionConfig()
    admission: AdmissionConfig = AdmissionConfig(enabled=False)
    tariff: Tariff = Tariff()
    flips: FlipConfig = FlipConfig()
    adapt: AdaptConfig = AdaptConfig()
    turns: bool = False
    """Steps wait here until a worker has room, and go in order; else they go at once, and wait at workers."""
    idle_timeout_s: Annotated[float, Meta(gt=0)] = 5.0
    """Longest silence of a decode worker (a living one proves itself every second)."""
