"""Limits of what a request may name."""

from collections.abc import Sequence

from tracehaul.wire.errors import InvalidRequest

HASHES_MAX = 65536
"""Blocks in one request."""
NAME_CHARS_MAX = 256
"""Of a tenant's or a trace's name."""


def check_count(items: Sequence[object]) -> None:
    """Raise InvalidRequest where a request names more blocks than any may."""
    if len(items) > HASHES_MAX:
        raise InvalidRequest(f"{len(items)} blocks in one request; at most {HASHES_MAX}")


def check_name(name: str) -> None:
    """Raise InvalidRequest where a tenant's, a trace's or a node's name is too long to be one."""
    if len(name) > NAME_CHARS_MAX:
        raise InvalidRequest(f"a name of {len(name)} characters; at most {NAME_CHARS_MAX}")
