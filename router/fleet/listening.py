"""Who wants to hear all that members say of themselves."""

from typing import Protocol

from tracehaul.wire.cluster import NodeInfo, NodeLoad


class Listener(Protocol):
    """See :class:`router.dispatch.bills.Bills`."""

    def heard(self, info: NodeInfo, load: NodeLoad, now_s: float, *, new: bool) -> None:
        """One is a member, and says this. ``new``: its life had no epoch before this router issued it."""
        ...

    def gone(self, info: NodeInfo, silent_s: float) -> None:
        """It is none any more, and was heard so long ago."""
        ...


class Nobody:
    """Implements it, and listens to nothing."""

    def heard(self, info: NodeInfo, load: NodeLoad, now_s: float, *, new: bool) -> None:
        pass

    def gone(self, info: NodeInfo, silent_s: float) -> None:
        pass
