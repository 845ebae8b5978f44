"""What room a router sees for the background."""

from collections.abc import Iterator, Mapping

from router.dispatch.pooled import Pooled
from router.fleet.load import Key
from router.fleet.members import MemberRegistry
from router.policy.slack import Seen, Slack, slack
from tracehaul.runtime import clock

SEEN_S = 0.1
"""What was seen counts for so long."""


class Room:
    """Of all members, as they say and as was sent to them since."""

    def __init__(self, members: MemberRegistry, pools: Mapping[str, Pooled]) -> None:
        self._members = members
        self._pools = pools
        self._slack, self._seen_at_s = Slack(0, 0.0), -SEEN_S

    def now(self) -> Slack:
        """How many steps of the background may be in progress."""
        now_s = clock.now_s()
        if now_s >= self._seen_at_s + SEEN_S:
            self._seen_at_s = now_s
            self._slack = slack(self._seen(now_s), now_s)
        return self._slack

    def _seen(self, now_s: float) -> Iterator[Seen]:
        """Every decode worker that may get new work."""
        waits_s: dict[Key, float] = {}
        for pool in self._pools.values():
            decodes = pool.front.decodes
            waits_s |= zip(decodes.keys, map(float, decodes.queue_s(now_s)), strict=True)
        for status in self._members.statuses():
            info, load = status.info, status.load
            if info.role != "decode" or status.health != "ready":
                continue
            key, pool = Key(info.node, info.generation), self._pools.get(info.pool)
            front = 0 if pool is None else pool.front.decodes.running(key)
            own = 0 if pool is None else pool.all.decodes.running(key) - front
            front = max(front, load.running - max(load.background, own))
            heard_s = now_s - status.heartbeat_age_s
            yield Seen(heard_s, front, own, load.background, load.waiting, waits_s.get(key, 0.0))
