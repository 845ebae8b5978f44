"""Changes to the limits of store nodes, as they are written on a command line."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.config import parse_bytes
from cluster.rundir import ClusterFault


class Change(NamedTuple):
    """One ``NAME=VALUE``, or ``NAME.KEY=VALUE`` for one entry of a limit that has several."""

    name: str
    key: str | None
    value: int | float | None
    """None: the entry goes."""


def parse_change(text: str) -> Change:
    """A change as it is written on the command line; sizes may have units.

    Raises:
        ClusterFault: it is none.
    """
    name, equals, value = text.partition("=")
    name, _, key = name.strip().partition(".")
    value = value.strip()
    if not equals or not name or not value:
        raise ClusterFault(f"not NAME=VALUE: {text!r}; for example --set leases_max=2048")
    if key and value == "none":
        return Change(name, key, None)
    try:
        if name.endswith(("_bytes", "_bytes_s")):
            return Change(name, key or None, parse_bytes(value))
        number = float(value)
        whole = number.is_integer() and not set(value) & set(".eE")
        return Change(name, key or None, int(value) if whole else number)
    except ValueError as error:
        raise ClusterFault(f"{name}: {error}") from None


def changes_for(limits: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """What to send to a node whose limits are ``limits``: of a limit with several entries the others stay."""
    wanted: dict[str, Any] = {}
    for change in changes:
        if change.key is None:
            wanted[change.name] = change.value
            continue
        before: Any = wanted.get(change.name, limits.get(change.name))
        entries: dict[str, Any] = dict(before) if isinstance(before, Mapping) else {}
        entries.pop(change.key, None)
        if change.value is not None:
            entries[change.key] = change.value
        wanted[change.name] = entries
    return wanted
