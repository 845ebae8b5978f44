"""What the router remembers of each trace. Pure; bounded; lost with the router at the cost of time only."""

from collections import OrderedDict
from dataclasses import dataclass

from tracehaul.wire.ids import BlockHash, Generation, NodeId, TraceId


@dataclass(frozen=True)
class Warm:
    """The decode worker that ran a trace's last step, in one life of it, and how many tokens it kept."""

    node: NodeId
    generation: Generation
    retained_tokens: int


@dataclass
class Trace:
    """One agent task, as far as placement cares."""

    trace: TraceId
    parent: TraceId | None
    home: NodeId | None = None
    """Store node that takes its blocks."""
    warm: Warm | None = None
    blocks: int = 0
    """Full blocks that its last step left: prompt and output."""
    last_hash: BlockHash | None = None
    """Of the last of them."""
    steps: int = 0
    running: int = 0


class Traces:
    """The registry, at most ``traces_max`` of them: the least recently used idle one goes first."""

    def __init__(self, traces_max: int) -> None:
        assert traces_max > 0
        self._max = traces_max
        self._traces: OrderedDict[TraceId, Trace] = OrderedDict()

    def __len__(self) -> int:
        return len(self._traces)

    def get(self, trace: TraceId) -> Trace | None:
        """Look without touching."""
        return self._traces.get(trace)

    def start(self, trace: TraceId, parent: TraceId | None) -> Trace:
        """A step of ``trace`` starts. A fork starts from its parent's places."""
        known = self._traces.get(trace)
        if known is None:
            known = Trace(trace, parent)
            origin = self._traces.get(parent) if parent is not None else None
            if origin is not None:
                known.home = origin.home
            self._traces[trace] = known
            self._make_room()
        self._traces.move_to_end(trace)
        known.steps += 1
        known.running += 1
        return known

    def end(self, trace: TraceId, *, final: bool) -> None:
        """A step of ``trace`` ended, whatever way; ``final``: the client says that no other follows."""
        known = self._traces.get(trace)
        if known is None:
            return
        known.running -= 1
        assert known.running >= 0
        if final and known.running == 0:
            del self._traces[trace]

    def _make_room(self) -> None:
        while len(self._traces) > self._max:
            idle = next((t for t, known in self._traces.items() if known.running == 0), None)
            if idle is None:
                return  # running steps are bounded by the API's own limit
            del self._traces[idle]
