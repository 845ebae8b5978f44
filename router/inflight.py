"""One attempt's entries in the fleets' books. Pure."""

from router.policy.fleet import Fleet
from router.policy.placement import Placement


class InFlight:
    """From when a step is sent to its workers until it ends there, whatever way."""

    def __init__(self, decodes: Fleet, prefills: Fleet, placement: Placement, now_s: float) -> None:
        self._decodes = decodes
        self._prefills = prefills
        self._placement = placement
        self._computed = False
        decodes.sent(placement.decode, placement.decode_work_s, now_s)
        if placement.prefill_work_s and placement.helper is not None:
            prefills.sent(placement.helper, placement.prefill_work_s, now_s)

    def token(self, now_s: float) -> None:
        """The worker has told of tokens; with the first of them the prompt is computed."""
        if not self._computed:
            self._computed = True
            self._decodes.computed(self._placement.decode, self._placement.decode_work_s, now_s)
            self._end_prefill(now_s)

    def ended(self, now_s: float) -> None:
        """It is over. To be called once."""
        placement = self._placement
        self._decodes.ended(placement.decode, placement.decode_work_s, now_s, computed=self._computed)
        if not self._computed:
            self._end_prefill(now_s)

    def _end_prefill(self, now_s: float) -> None:
        placement = self._placement
        if placement.prefill_work_s and placement.helper is not None:
            self._prefills.ended(placement.helper, placement.prefill_work_s, now_s, computed=False)
