"""What stands between agents and the fleet: who is refused comes back when it was told to, who was let in waits for its
turn. Pure."""

import numpy as np

from router.policy.admission import Admission, AdmissionConfig, Memory
from router.policy.order import Stretch, Waiter
from router.policy.turns import Turns
from sim.fleet.clock import Clock
from sim.fleet.life import Life, Trace
from sim.fleet.model import Fleet
from sim.fleet.shape import Shape

LOOK_S = 0.5


class Gate:
    """Between agents and a fleet. Without ``config`` all are let in; without ``turns`` no step waits in front."""

    def __init__(
        self, config: AdmissionConfig | None, shape: Shape, fleet: Fleet, clock: Clock, *, turns: Stretch | None = None
    ) -> None:
        self.admission = Admission(config or AdmissionConfig(enabled=False))
        self.admission.resize(
            Memory(
                sum(kind.count * kind.kv_tokens for kind in shape.workers if kind.role == "decode"),
                sum(kind.count * kind.memory_tokens for kind in shape.stores),
            )
        )
        self.life: Life | None = None
        self._fleet = fleet
        self._clock = clock
        self._promised: dict[str, tuple[float, float]] = {}
        """When each was refused first, and how long it was told to wait."""
        self.waits: list[tuple[float, float]] = []
        """Told first, and waited in the end, in seconds."""
        self._turns = Turns[Trace](turns) if turns is not None else None
        self._kind = next(kind for kind in shape.workers if kind.role == "decode")
        if turns is not None:
            fleet.computed = lambda trace: self._next()
            self._look()

    def __len__(self) -> int:
        return len(self.admission)

    def lets_in(self, trace: Trace, ago_s: float, wait_s: float) -> bool:
        """Whether a trace that is found in its middle is one that was let in."""
        now_s = self._clock.now_s
        if self.admission.ask(trace.name, now_s) is not None:
            self.admission.forget(trace.name)
            return False
        self.admission.begins(trace.name, trace.call.prompt, now_s - ago_s)
        if trace.index and ago_s + wait_s > 0:
            self.admission.ends(trace.name, trace.call.prompt, now_s - ago_s)
        return True

    def step(self, trace: Trace) -> None:
        """A trace's next step; of a trace that nobody started and that has none yet, if it is let in."""
        now_s, root = self._clock.now_s, trace.name
        trace.asked_s = min(trace.asked_s, now_s)
        if trace.parent is None and trace.index == 0:
            refusal = self.admission.ask(root, now_s)
            if refusal is not None:
                self._promised.setdefault(root, (now_s, refusal.start_s))
                self._clock.after(refusal.retry_s, lambda: self.step(trace))
                return
            if root in self._promised:
                since_s, told_s = self._promised.pop(root)
                self.waits.append((told_s, now_s - since_s))
            trace.began_s = now_s
        self.admission.begins(trace.name, trace.call.prompt, now_s)
        if self._turns is None:
            self._fleet.step(trace)
            return
        takes_s = self._fleet.takes_s(trace)
        begins = trace.parent is None and trace.index == 0
        given_s = max(trace.used_s, 0.0 if trace.parent is None else trace.parent.used_s)
        waiter = Waiter(now_s, given_s=given_s, takes_s=takes_s, begins=begins)
        self._turns.join(trace, waiter, trace.call.prompt)
        self._next()

    def _look(self) -> None:
        self._next()
        self._clock.after(LOOK_S, self._look)

    def _next(self) -> None:
        """Those go whose turn it is."""
        if self._turns is None:
            return
        while True:
            trace = self._turns.next(self._fleet.decodes, self._fleet.prefills, self._clock.now_s)
            if trace is None:
                return
            self._fleet.step(trace)

    def ended(self, trace: Trace) -> None:
        """A step has."""
        self.admission.ends(trace.name, trace.call.prompt + trace.call.output, self._clock.now_s)
        if self._turns is not None:
            self._turns.moved(self._clock.now_s)
            trace.used_s += self._used_s(trace)
        assert self.life is not None
        self.life.ended(trace)
        self._next()

    def _used_s(self, trace: Trace) -> float:
        """What its step took of a worker that has a full batch."""
        call, kind = trace.call, self._kind
        decode_s = kind.decode_s(1, call.prompt) / 2
        return kind.compute_s(trace.cached, call.prompt) + call.output * decode_s

    def over(self, trace: Trace) -> None:
        """A trace has."""
        self.admission.over(trace.name, self._clock.now_s)
        self._fleet.over(trace)

    def late_share(self) -> float:
        """Of the waits that agents were told first, the median of by how much they were wrong."""
        if not self.waits:
            return 0.0
        told, was = np.array(self.waits).T
        return float(np.median(np.abs(told / was - 1)))
