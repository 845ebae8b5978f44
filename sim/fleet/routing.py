"""Where steps run: by the router's own policy, or by those that it is measured against. Pure."""

from collections.abc import Sequence

from router.fleet.load import Key
from router.policy.cost import StoredRun
from router.policy.knobs import DEFAULT, Knobs
from router.policy.placement import Ask, Placement, Policy, choose_home, place
from sim.fleet.life import Trace
from sim.fleet.model import Fleet
from tracehaul.wire.ids import BlockHash

HOST_CREDIT = 0.75
"""What a token in a worker's host memory counts of one in its own, for who routes by caches."""


class Ours:
    """The router's, over the shared store."""

    private = False
    shrinks = False

    def __init__(self, policy: Policy = "cost", *, name: str = "ours", knobs: Knobs = DEFAULT) -> None:
        self.name = name
        self.knobs = knobs
        self._policy: Policy = policy
        self._turn = 0

    def place(self, fleet: Fleet, trace: Trace, hashes: Sequence[BlockHash]) -> Placement:
        call, size = trace.call, fleet.shape.block_tokens
        found = fleet.index.match(hashes) if fleet.stores else None
        most = call.keeps if trace.task.scoped else call.prompt - 1
        stored: list[StoredRun] = []
        for run in found.runs if found is not None else ():
            end = run.end * size
            if trace.task.scoped and most - end < size:
                end = most  # tails are kept, too
            raise_s = max(store.kind.disk_token_s for store in fleet.stores.values()) if run.tier else 0.0
            stored.append(StoredRun(min(end, most), raise_s))
            if end >= most:
                break
        self._turn += 1
        turn, output = self._turn, fleet.outputs.tokens
        ask = Ask(trace.name, call.prompt, stored, trace.warm, fleet.home(trace), turn=turn, output_tokens=output)
        stores = fleet.names if stored or fleet.stores else []
        placement = place(self._policy, ask, fleet.decodes, fleet.prefills, stores, fleet.clock.now_s, self.knobs)
        assert placement is not None
        return placement


class Sticky:
    """A trace stays on the worker that ran its first step, the one with the least to do then. What a worker gives up
    goes to its own part of the host memory."""

    private = True
    shrinks = True
    name = "sticky"

    def place(self, fleet: Fleet, trace: Trace, hashes: Sequence[BlockHash]) -> Placement:
        ask = Ask(trace.name, trace.call.prompt, (), trace.warm, None)
        placement = place("sticky", ask, fleet.decodes, fleet.prefills, (), fleet.clock.now_s)
        assert placement is not None
        return placement


class CacheAware:
    """Each step goes where the tokens to be computed for it and those that are decoded there are fewest, as cache-aware
    routers have it; host memory is each worker's own, and known to the router."""

    private = True
    shrinks = True
    name = "offload"

    def place(self, fleet: Fleet, trace: Trace, hashes: Sequence[BlockHash]) -> Placement:
        call, size = trace.call, fleet.shape.block_tokens
        best: Key | None = None
        least = float("inf")
        keys, held = fleet.decodes.keys, trace.held
        for row in (*held, int(fleet.decodes.running_steps.argmin())):
            key = keys[row]
            worker = fleet.workers[key]
            device = min(worker.idle.get(trace.name, 0.0), held.get(row, 0.0))
            store = fleet.own_store(key)
            host = store.leading(hashes)[0] * size if store is not None and row in held else 0
            host = min(host, call.keeps)
            missing = call.prompt - device - HOST_CREDIT * max(0.0, host - device)
            cost = missing + worker.active_tokens
            if cost < least:
                best, least = key, cost
        assert best is not None
        work_s = fleet.workers[best].kind.compute_s(min(call.keeps, held.get(fleet.rows[best], 0.0)), call.prompt)
        return Placement(
            best, None, choose_home((), trace.name, None), 0, None, "fewest tokens", 0.0, None, work_s, 0.0
        )
