"""What the next iteration computes: one continuous batch under a token budget. Pure.

Each job has a number of *pending* tokens: known, but without KV yet. One pending token is a decode step, several are
a prompt (or what is left of it). Decode steps go first, since a token costs them one pass whatever shares it; prompts
fill the rest of the budget in order of their ranks, in chunks.

Jobs of the background get what is left: nothing beside a prompt of others, beside others' decode steps their own and a
few tokens of a prompt, and where there is nobody else a piece of one, short enough to be waited for.
"""

from typing import NamedTuple


class Grant(NamedTuple):
    """Compute the next ``tokens`` pending tokens of job ``key`` in this iteration."""

    key: int
    tokens: int


class Scheduler:
    """Decode steps in turn, prompts by rank; no job starves while others come and go, if ranks grow with time."""

    def __init__(self, chunk_tokens: int, sequences_max: int) -> None:
        assert chunk_tokens > 0
        assert sequences_max > 0
        self._chunk_tokens = chunk_tokens
        self._sequences_max = sequences_max
        self._pending: dict[int, int] = {}
        self._at_most: dict[int, int] = {}
        self._ranks: dict[int, float] = {}
        self._background: set[int] = set()

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, key: int, pending: int, at_most: int | None = None, *, rank: float, background: bool = False) -> None:
        """A job with ``pending`` tokens to compute joins; no more than ``at_most`` of them in one iteration.

        Prompts of a lower ``rank`` come first; of the same rank, the one in progress, then the one that came first.
        """
        assert key not in self._pending
        assert pending > 0
        assert at_most is None or at_most > 0
        self._pending[key] = pending
        if at_most is not None:
            self._at_most[key] = at_most
        self._ranks[key] = rank
        if background:
            self._background.add(key)

    def remove(self, key: int) -> None:
        """A job leaves: ended or aborted. Removing it twice is harmless."""
        self._pending.pop(key, None)
        self._at_most.pop(key, None)
        self._ranks.pop(key, None)
        self._background.discard(key)

    def plan(self, beside: int = 0) -> list[Grant]:
        """Grants for the next iteration, decode steps first; at most ``sequences_max``, ``chunk_tokens`` in sum.

        ``beside``: so many tokens of the background's prompts may run beside others' decode steps.
        """
        if not self._background:
            return self._front(self._decodes(), self._prompts())
        prompts = self._prompts(background=False)
        grants = self._front(self._decodes(background=False), prompts)
        return grants if prompts else grants + self._behind(grants, beside)

    def _decodes(self, *, background: bool | None = None) -> list[int]:
        return [key for key, pending in self._pending.items() if pending == 1 and self._of(key, background)]

    def _prompts(self, *, background: bool | None = None) -> list[int]:
        found = [key for key, pending in self._pending.items() if pending > 1 and self._of(key, background)]
        return sorted(found, key=self._ranks.__getitem__)

    def _of(self, key: int, background: bool | None) -> bool:
        return background is None or (key in self._background) == background

    def _behind(self, front: list[Grant], beside: int) -> list[Grant]:
        """For the background, with others' decode steps or without any."""
        decodes, prompts = self._decodes(background=True), self._prompts(background=True)
        budget = self._chunk_tokens - len(front)
        places = min(self._sequences_max - len(front), budget - bool(prompts and not front))
        grants = [Grant(key, 1) for key in decodes[: max(0, places)]]
        budget -= len(grants)
        if prompts and len(front) + len(grants) < self._sequences_max:
            key = prompts[0]  # one at a time: it is short enough alone
            tokens = min(self._pending[key], budget, self._at_most.get(key, budget))
            if front:
                tokens = min(tokens, beside)
            if tokens > 0:
                grants.append(Grant(key, tokens))
        return grants

    def _front(self, decodes: list[int], prompts: list[int]) -> list[Grant]:
        # However many decode, the first prompt gets on.
        places = max(1, min(self._sequences_max, self._chunk_tokens) - bool(prompts))
        grants = [Grant(key, 1) for key in decodes[:places]]
        budget = self._chunk_tokens - len(grants)
        for key in prompts:
            if budget == 0 or len(grants) == self._sequences_max:
                break
            grant = Grant(key, min(self._pending[key], budget, self._at_most.get(key, budget)))
            budget -= grant.tokens
            grants.append(grant)
        return grants

    def computed(self, grant: Grant, sampled: bool) -> None:
        """An iteration did ``grant``; if it sampled a token, that token is pending now.

        The job moves behind the others of its kind, so a budget smaller than the batch is shared in turn.
        """
        pending = self._pending.pop(grant.key, None)
        if pending is None:
            return  # left while the iteration ran
        pending += int(sampled) - grant.tokens
        assert pending > 0
        if pending > 1:
            # A prompt keeps its place: finishing one prompt before the next gives the earlier first token.
            self._pending = {grant.key: pending, **self._pending}
        else:
            self._pending[grant.key] = pending
