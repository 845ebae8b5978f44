"""The router's loop on a simulated fleet: the same code, and roles that change as workers change them. Pure."""

from router.adapt.loop import AdaptConfig, Change, Loop, Seat, Verdict, View
from router.adapt.model import Roles
from router.adapt.window import Ended
from router.fleet.load import Key
from router.policy.placement import Placement
from sim.fleet.life import Trace
from sim.fleet.model import Fleet

DRAINED_S = 0.25
"""Between two looks whether a worker that is to change has ended its work."""


class Adapting:
    """Watches a fleet, and turns it."""

    def __init__(self, fleet: Fleet, config: AdaptConfig) -> None:
        self.told: list[tuple[float, Change | Verdict]] = []
        self._fleet = fleet
        self._config = config
        self.loop = Loop(config, self._tell)
        self._ended_s: dict[str, float] = {}
        """When each trace's last step did."""
        self._turning = False
        fleet.watch = self
        fleet.clock.after(config.every_s, self._look)

    def _tell(self, one: Change | Verdict) -> None:
        self.told.append((self._fleet.clock.now_s, one))

    def placed(self, trace: Trace, placement: Placement) -> None:
        """A step was."""
        now_s = self._fleet.clock.now_s
        before_s = self._ended_s.get(trace.name)
        gap_s = None if before_s is None else now_s - before_s
        self.loop.window.placed(now_s, placement.decode_work_s + placement.prefill_work_s, gap_s)

    def ended(self, trace: Trace, seconds: float) -> None:
        """A step has; before its trace goes on."""
        call, now_s = trace.call, self._fleet.clock.now_s
        self._ended_s[trace.name] = now_s
        deadline_s = call.deadline_s if call.deadline_s < float("inf") else None
        self.loop.window.ended(now_s, Ended(call.prompt - call.keeps, call.output, seconds, deadline_s))

    def _look(self) -> None:
        fleet = self._fleet
        change = self.loop.look(self._view())
        if change is not None:
            key = next(key for key in fleet.workers if key.node == change.node)
            self._turning = True
            fleet.leave(key)
            self._turn(change, key)
        fleet.clock.after(self._config.every_s, self._look)

    def _turn(self, change: Change, key: Key) -> None:
        """Once its work has ended."""
        fleet = self._fleet
        if not fleet.workers[key].quiet:
            fleet.clock.after(DRAINED_S, lambda: self._turn(change, key))
            return
        fleet.take(key, change.role)
        self._turning = False
        self.loop.done(change, fleet.clock.now_s)

    def _view(self) -> View:
        fleet = self._fleet
        decodes, prefills = fleet.decodes, fleet.prefills
        paces = [
            (int(decodes.decoding[row]), fleet.workers[key].decode_s)
            for row, key in enumerate(decodes.keys)
            if decodes.decoding[row]
        ]
        kind = fleet.shape.workers[0]
        return View(
            fleet.clock.now_s,
            not self._turning,
            Roles(len(prefills), len(decodes)),
            tuple(paces),
            float(kind.sequences_max),
            tuple(Seat(key.node, prefills.running(key)) for key in prefills.keys),
            tuple(Seat(key.node, decodes.running(key)) for key in decodes.keys),
        )
