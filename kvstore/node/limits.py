"""Which limits of a running store node can be changed, and what a change makes of its config. Pure."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from kvstore.config import StoreConfig
from kvstore.tiers.tiering import TieringConfig
from tracehaul.wire.errors import InvalidRequest

LIVE = (
    "reservation_ttl_s",
    "reservation_quiet_s",
    "lease_ttl_max_s",
    "reservations_max",
    "leases_max",
    "changes_max",
    "subscribers_max",
    "waiters_max",
    "wait_max_s",
    "quota_bytes",
    "pin_ttl_max_s",
    "pins_max",
    "pins_tenant_max",
    "hard_share_max",
    "hard_tenant_share_max",
)
"""Of :class:`StoreConfig`."""
LIVE_TIERING = ("promotions_max", "promote_timeout_s", "scrub_bytes_s")
"""Of :class:`TieringConfig`, where the node has a tier below its memory."""

FIXED = {
    "arena_bytes": "its memory is registered with the transports; restart the node with another --store-bytes",
    "slot_bytes": "it follows from the model's blocks",
    "late_write_s": "slots at rest were promised their time under the old one; restart the node",
    "pin_half_life_s": "the ranks of open pins were computed with it; restart the node",
    "disk_bytes": "the file is laid out at the start; restart the node with another --disk-bytes: what fits is kept",
    "s3_bytes": "the bucket's index is made at the start; restart the node with another --s3-bytes",
}
"""What cannot change in a node's life, and why."""

C = TypeVar("C", StoreConfig, TieringConfig)


def limits_of(store: StoreConfig, tiering: TieringConfig | None) -> dict[str, Any]:
    """Every limit by name."""
    return msgspec.structs.asdict(store) | (msgspec.structs.asdict(tiering) if tiering is not None else {})


def live_of(tiering: TieringConfig | None) -> tuple[str, ...]:
    """Names of what can be changed."""
    return LIVE + (LIVE_TIERING if tiering is not None else ())


def changed(
    store: StoreConfig, tiering: TieringConfig | None, changes: Mapping[str, Any]
) -> tuple[StoreConfig, TieringConfig | None]:
    """The configs with ``changes``, each checked as a whole by its own rules.

    Raises:
        InvalidRequest: a name is unknown or fixed, a value is of the wrong type, or they contradict each other.
    """
    live = live_of(tiering)
    for name in changes:
        if name in live:
            continue
        if name in FIXED:
            raise InvalidRequest(f"{name} is fixed for the node's life: {FIXED[name]}")
        if name in LIVE_TIERING:
            raise InvalidRequest(f"{name}: this node has no tier below its memory")
        if name in limits_of(store, tiering):
            raise InvalidRequest(f"{name} is fixed for the node's life")
        raise InvalidRequest(f"no limit is called {name}; there are {', '.join(live)}")
    below = {name: value for name, value in changes.items() if name in LIVE_TIERING}
    above = {name: value for name, value in changes.items() if name not in below}
    return _with(store, above), _with(tiering, below) if tiering is not None else None


def _with(config: C, changes: Mapping[str, Any]) -> C:
    try:
        return msgspec.convert({**msgspec.structs.asdict(config), **changes}, type(config))
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
