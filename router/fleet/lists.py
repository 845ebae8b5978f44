"""What nodes are told of the members: one list for each kind of viewer, whose changes are the same for all. Pure."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping

from tracehaul.wire.cluster import Members, MembersChanged, NodeInfo, Viewer
from tracehaul.wire.ids import Epoch, NodeId

CHANGES_MAX = 64
"""Of a list, kept for those who are slow to take them; who has missed more is sent the whole list."""


class MemberList:
    """The members that one kind of viewer needs, by version."""

    def __init__(self, viewer: Viewer, infos: Iterable[NodeInfo], draining: Collection[NodeId]) -> None:
        self._viewer = viewer
        self._nodes = {info.node: info for info in infos if viewer.needs(info)}
        self._draining = self._of_us(draining)
        self._changes: deque[MembersChanged] = deque(maxlen=CHANGES_MAX)
        self.version = 1

    def publish(
        self, touched: Mapping[NodeId, NodeInfo | None], draining: Collection[NodeId], settles_s: float = 0.0
    ) -> bool:
        """Take in what became of those that something happened to (None: gone); whether the list is another now.

        ``settles_s``: as in :class:`tracehaul.wire.cluster.MembersChanged`.
        """
        joined: list[NodeInfo] = []
        left: list[NodeId] = []
        for node, info in sorted(touched.items()):
            known = self._nodes.get(node)
            wanted = info if info is not None and self._viewer.needs(info) else None
            if wanted is not None and wanted != known:
                joined.append(wanted)
                self._nodes[node] = wanted
            elif wanted is None and known is not None:
                left.append(node)
                del self._nodes[node]
        now_draining = self._of_us(draining)
        if not joined and not left and now_draining == self._draining:
            return False
        self._draining = now_draining
        self.version += 1
        self._changes.append(MembersChanged(self.version, tuple(joined), tuple(left), now_draining, settles_s))
        return True

    def whole(self, epoch: Epoch, settles_s: float) -> Members:
        """All of it, for one viewer."""
        return Members(self.version, tuple(self._nodes.values()), self._draining, epoch, settles_s)

    def since(self, version: int) -> list[MembersChanged] | None:
        """What follows that version, in order; None: that is not known any more."""
        missed = self.version - version
        if not 0 <= missed <= len(self._changes):
            return None
        return [change for change in self._changes if change.version > version]

    def _of_us(self, draining: Collection[NodeId]) -> tuple[NodeId, ...]:
        return tuple(node for node in sorted(draining) if node in self._nodes)
