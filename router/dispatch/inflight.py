"""One attempt's entries in the fleets' books. Pure."""

from router.fleet.load import WorkerTable
from router.policy.placement import Placement


class InFlight:
    """From when a step is sent to its workers until it ends there, whatever way."""

    def __init__(self, decodes: WorkerTable, prefills: WorkerTable, placement: Placement, now_s: float) -> None:
        self._decodes = decodes
        self._prefills = prefills
        self._placement = placement
        self._computed = False
        decodes.sent(placement.decode, placement.decode_work_s, now_s)
        if placement.queued is not None:
            prefills.sent(placement.queued, placement.prefill_work_s, now_s)

    def token(self, now_s: float) -> None:
        """The worker has told of tokens; with the first of them the prompt is computed."""
        placement = self._placement
        if not self._computed:
            self._computed = True
            self._decodes.computed(placement.decode, placement.decode_work_s, now_s)
            if placement.queued is not None:
                self._prefills.computed(placement.queued, placement.prefill_work_s, now_s)
                self._prefills.ended(placement.queued, placement.prefill_work_s, computed=True)

    def ended(self) -> None:
        """It is over. To be called once."""
        placement = self._placement
        self._decodes.ended(placement.decode, placement.decode_work_s, computed=self._computed)
        if not self._computed and placement.queued is not None:
            self._prefills.ended(placement.queued, placement.prefill_work_s, computed=False)
