"""How many responses run in the background, and whose they are. Pure."""

from collections.abc import Collection, Generator
from contextlib import contextmanager

from router.calls.errors import CallFailed, unavailable

Key = tuple[str, str]
"""A tenant, and the name of a response."""


class Places:
    """At one router. ``most``: of all tenants'."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entering: dict[Key, str] = {}

    @contextmanager
    def entering(self, key: Key, tenant: str, running: Collection[str], *, shared: bool) -> Generator[None, None, None]:
        """One has a place, as long as this is open, before it is among ``running``: the tenants of those that are.

        ``shared``: with tenants who have as good a right to it.

        Raises:
            CallFailed: there is none, or the tenant would have more places than it leaves to others.
        """
        tenants = [*self._entering.values(), *running]
        free, own = self._most - len(tenants), tenants.count(tenant)
        if free <= 0:
            raise unavailable("too many responses run in the background", "overloaded")
        if shared and own >= free:
            message = f"{own} responses of this API key's tenant run in the background, which leaves as many to others"
            raise CallFailed("limited", message, code="rate_limit_exceeded")
        self._entering[key] = tenant
        try:
            yield
        finally:
            del self._entering[key]
