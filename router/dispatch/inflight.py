"""One attempt's entries in a pool's books. Pure."""

from collections.abc import Sequence
from typing import Protocol

from router.fleet.load import WorkerTable
from router.policy.placement import Placement


class Tables(Protocol):
    """A book."""

    decodes: WorkerTable
    prefills: WorkerTable


class InFlight:
    """From when a step, of so many tokens, is sent to its workers until it ends there, whatever way."""

    def __init__(self, books: Sequence[Tables], placement: Placement, now_s: float, tokens: int) -> None:
        self._books = books
        self._placement = placement
        self._tokens = tokens
        self._computed = False
        for book in books:
            book.decodes.sent(placement.decode, placement.decode_work_s, now_s, tokens)
            if placement.queued is not None:
                book.prefills.sent(placement.queued, placement.prefill_work_s, now_s)

    def token(self, now_s: float) -> None:
        """The worker has told of tokens; with the first of them the prompt is computed."""
        if self._computed:
            return
        self._computed = True
        placement = self._placement
        for book in self._books:
            book.decodes.computed(placement.decode, placement.decode_work_s, now_s)
            if placement.queued is not None:
                book.prefills.computed(placement.queued, placement.prefill_work_s, now_s)
                book.prefills.ended(placement.queued, placement.prefill_work_s, computed=True)

    def ended(self) -> None:
        """It is over. To be called once."""
        placement = self._placement
        for book in self._books:
            work_s, computed = placement.decode_work_s, self._computed
            book.decodes.ended(placement.decode, work_s, computed=computed, tokens=self._tokens)
            if not self._computed and placement.queued is not None:
                book.prefills.ended(placement.queued, placement.prefill_work_s, computed=False)
