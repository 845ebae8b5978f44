"""What a node knows of the others when several routers tell it: the union of what they say. It knows no clock or task.

A router that is lost says nothing, so what it said last stays. One that has just started has a list that still fills,
and one that stood still was given up by nodes that live: what they do not list any more stays for a while, too.
"""

from dataclasses import dataclass, field

from tracehaul.wire.cluster import Members, MembersChanged, NodeInfo
from tracehaul.wire.ids import NodeId


@dataclass
class _Router:
    listed: dict[NodeId, NodeInfo] = field(default_factory=dict[NodeId, NodeInfo])
    draining: frozenset[NodeId] = frozenset()
    """Of those listed."""
    former: dict[NodeId, tuple[NodeInfo, bool]] = field(default_factory=dict[NodeId, tuple[NodeInfo, bool]])
    """What it listed and does not list now, without having said that it is gone; and whether it was draining."""
    version: int = 0
    heard: bool = False
    since_s: float = 0.0
    """When its list will be, or was, whole; of one that is not heard: when it was lost."""
    ended: bool = False
    """It is no router any more, and is forgotten with what it said last."""

    def settled(self, now_s: float) -> bool:
        """Whether who is not on its list is no member of it."""
        return self.heard and self.since_s <= now_s


class Views:
    """One view for each router, merged. What is told of a life with a lower rank than another of its name is ignored.

    ``grace_s``: how long what a lost router said outlives it, once another one knows who is there.
    """

    def __init__(self, grace_s: float) -> None:
        self._routers: dict[str, _Router] = {}
        self._grace_s = grace_s

    def add(self, router: str) -> None:
        """There is that router."""
        self._routers.setdefault(router, _Router()).ended = False

    def end(self, router: str, now_s: float) -> None:
        """That router, which is lost, will not be there again."""
        self._routers[router].ended = True
        self._expire(now_s)

    def listed(self, router: str, members: Members, now_s: float) -> None:
        """That router sent its whole list."""
        view = self._routers[router]
        self._keep(view)
        view.listed = {info.node: info for info in members.nodes}
        view.draining = frozenset(members.draining)
        view.version, view.heard, view.since_s = members.version, True, now_s + members.settles_s
        self._expire(now_s)

    def changed(self, router: str, change: MembersChanged, now_s: float) -> bool:
        """That router sent what has changed. False: something before it is missing, and nothing was taken in."""
        view = self._routers[router]
        if not view.heard or change.version != view.version + 1:
            return False
        view.version = change.version
        if change.settles_s:
            view.since_s = max(view.since_s, now_s + change.settles_s)
        for node in change.left:
            info = view.listed.pop(node, None)
            if info is not None and change.settles_s:
                view.former[node] = info, node in view.draining
            elif info is not None:
                self._forget(info)
        view.listed |= {info.node: info for info in change.joined}
        view.draining = frozenset(change.draining)
        self._expire(now_s)
        return True

    def lost(self, router: str, now_s: float) -> None:
        """That router is not heard any more."""
        view = self._routers[router]
        self._keep(view)
        view.listed, view.draining, view.heard, view.since_s = {}, frozenset(), False, now_s

    def merged(self, now_s: float) -> tuple[tuple[NodeInfo, ...], tuple[NodeId, ...]]:
        """Who is there, and who of them is draining; by name."""
        self._expire(now_s)
        views = [view for view in self._routers.values() if view.listed or view.former]
        if len(views) == 1 and not views[0].former:  # as it mostly is
            listed, draining = views[0].listed, views[0].draining
            return tuple(listed[node] for node in sorted(listed)), tuple(sorted(draining & listed.keys()))
        best: dict[NodeId, tuple[NodeInfo, bool]] = {}
        for view in self._routers.values():
            for node, info in view.listed.items():
                _take(best, info, node in view.draining)
        there = {node: info.rank for node, (info, _) in best.items()}
        for view in self._routers.values():
            for node, (info, draining) in view.former.items():
                if node not in there or info.rank > there[node]:
                    _take(best, info, draining)
        names = sorted(best)
        return tuple(best[node][0] for node in names), tuple(node for node in names if best[node][1])

    def deadline_s(self, now_s: float) -> float | None:
        """When :meth:`merged` next says something else by itself."""
        ends = [self._ends_s(view, now_s) for view in self._routers.values() if view.former]
        settles = [view.since_s for view in self._routers.values() if view.heard]
        return min([at_s for at_s in (*ends, *settles) if at_s is not None and at_s > now_s], default=None)

    def _keep(self, view: _Router) -> None:
        view.former |= {node: (info, node in view.draining) for node, info in view.listed.items()}

    def _forget(self, info: NodeInfo) -> None:
        """A router that knows says that this life is gone: what others said of it once does not count."""
        for view in self._routers.values():
            former = view.former.get(info.node)
            if former is not None and former[0].rank <= info.rank:
                del view.former[info.node]

    def _expire(self, now_s: float) -> None:
        for router, view in list(self._routers.items()):
            ends_s = self._ends_s(view, now_s)
            if ends_s is not None and ends_s <= now_s:
                view.former.clear()
            if view.ended and not view.former:
                del self._routers[router]

    def _ends_s(self, view: _Router, now_s: float) -> float | None:
        """When what a router listed once does not count any more; None: as long as nobody knows better."""
        if view.heard:
            return view.since_s
        known = [other.since_s for other in self._routers.values() if other.settled(now_s)]
        return max(view.since_s, min(known)) + self._grace_s if known else None


def _take(best: dict[NodeId, tuple[NodeInfo, bool]], info: NodeInfo, draining: bool) -> None:
    known = best.get(info.node)
    if known is None or info.rank > known[0].rank:
        best[info.node] = info, draining
    elif info.rank == known[0].rank and draining:
        best[info.node] = known[0], True
