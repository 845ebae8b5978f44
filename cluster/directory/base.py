"""What a directory of routers is, whoever keeps it."""

from collections.abc import Callable
from typing import NoReturn, Protocol

Told = Callable[[tuple[str, ...]], None]
"""Is given ``host:port`` of each router's control plane, sorted."""


class Directory(Protocol):
    """Tells which routers there are. What it has said last counts for as long as nothing else is known: one that is
    dead, frozen, slow or empty takes no router away."""

    @property
    def routers(self) -> tuple[str, ...]:
        """As far as is known; at first those of the plan."""
        ...

    @property
    def fault(self) -> str:
        """Why it cannot be asked now, in a few words; empty if it can."""
        ...

    async def follow(self, told: Told) -> NoReturn:
        """Tell of the routers now and whenever they change, until cancelled. It never fails."""
        ...

    async def announce(self, name: str, address: str) -> NoReturn:
        """Keep that router in it, until cancelled; then take it out. It never fails."""
        ...
