"""Lets traces begin, or says when they may: :mod:`router.policy.admission` over what the fleet announces."""

from typing import ClassVar

from router.dispatch.stats import DispatchStats
from router.dispatch.steps import StepRequest
from router.fleet.members import MemberRegistry
from router.fleet.pools import in_pool
from router.policy.admission import Admission, AdmissionConfig, Memory
from router.policy.order import CLASS_WEIGHTS
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.wire.errors import Overloaded

log = Log(__name__)

LOOK_S = 1.0
"""How old what is known of the fleet's memory may be."""


class NotAdmitted(Overloaded):
    """A trace may not begin now. Nothing was done for it."""

    code: ClassVar[str] = "not_admitted"

    def __init__(self, message: str, retry_after_s: float, begins_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.begins_s = begins_s


class Gate:
    """One router's: a gate for each pool. Background steps are not its business: they wait for slack elsewhere."""

    def __init__(self, members: MemberRegistry, config: AdmissionConfig, stats: DispatchStats, *, stores: bool) -> None:
        self._members = members
        self._config = config
        self._stats = stats
        self._stores = stores
        self._pools: dict[str, tuple[Admission, float]] = {}
        """With when its memory was looked at."""

    def pool(self, name: str) -> Admission:
        """A pool's, which knows its memory."""
        now_s = clock.now_s()
        admission, looked_s = self._pools.get(name) or (Admission(self._config), -LOOK_S)
        if now_s - looked_s >= LOOK_S:
            admission.resize(self._memory(name))
            self._pools[name] = (admission, now_s)
        return admission

    def enter(self, request: StepRequest, *, known: bool) -> None:
        """A step begins. ``known``: its trace had one before.

        Raises:
            NotAdmitted: it is its trace's first, and no trace may begin now.
        """
        if not self._counts(request):
            return
        now_s, key = clock.now_s(), (request.salt, request.trace)
        admission = self.pool(request.pool)
        if not known and request.parent is None:
            weight = CLASS_WEIGHTS[request.step_class]
            refusal = admission.ask(key, now_s, request.tenant, weight)
            if refusal is not None:
                self._stats.traces_refused += 1
                retry_s, start_s = refusal
                log.debug("a trace was refused", trace=request.trace, tenant=request.tenant, start_s=start_s)
                raise NotAdmitted(
                    f"the fleet's memory is taken by {len(admission)} traces{in_pool(request.pool)}, and "
                    f"{admission.waiting} wait to begin; this one is expected to in {start_s:.0f} s: "
                    f"ask again under the same trace id in {max(1, round(retry_s))} s",
                    retry_s,
                    start_s,
                )
        admission.begins(key, request.prompt_tokens, now_s, request.tenant)

    def leave(self, request: StepRequest, output_tokens: int) -> None:
        """It has ended, whatever way, after so many tokens."""
        if not self._counts(request):
            return
        now_s, key = clock.now_s(), (request.salt, request.trace)
        admission = self.pool(request.pool)
        admission.ends(key, request.prompt_tokens + output_tokens, now_s)
        if request.final:
            admission.over(key, now_s)

    def _counts(self, request: StepRequest) -> bool:
        return self._config.enabled and request.step_class != "background"

    def _memory(self, pool: str) -> Memory:
        decodes = self._members.live("decode", pool)
        tokens = sum(worker.limits.kv_tokens_max for worker in decodes)
        token_bytes = [
            load.bytes_max / worker.limits.kv_tokens_max
            for worker, load in zip(decodes, self._members.loads(decodes), strict=True)
            if load.bytes_max and worker.limits.kv_tokens_max
        ]
        if not self._stores or not token_bytes:
            return Memory(tokens, 0.0)
        stores = self._members.live("store")
        nbytes = sum(load.bytes_max for load in self._members.loads(stores))
        return Memory(tokens, nbytes / max(token_bytes))
