"""How long blocks take to come up from each tier, learned from those that did. Pure."""

from collections.abc import Sequence

ASSUMED_BLOCK_S = 1e-3
"""Until something was seen."""
PRIOR_BLOCKS = 16
KEEP_BLOCKS = 4096
"""What is older than so many blocks counts for half."""


class RaiseMeter:
    """Seconds per block for each of a number of tiers, while they are busy: calls that overlap share the time."""

    def __init__(self, tiers: int) -> None:
        self._busy_s = [PRIOR_BLOCKS * ASSUMED_BLOCK_S] * tiers
        self._blocks = [float(PRIOR_BLOCKS)] * tiers
        self._under_way = [0] * tiers
        self._since_s = [0.0] * tiers

    @property
    def block_s(self) -> Sequence[float]:
        """By tier, the fastest first."""
        return [busy_s / blocks for busy_s, blocks in zip(self._busy_s, self._blocks, strict=True)]

    def began(self, tier: int, now_s: float) -> None:
        """Blocks are being read from it."""
        self._count(tier, now_s)
        self._under_way[tier] += 1

    def ended(self, tier: int, blocks: int, now_s: float) -> None:
        """So many of what began have come, perhaps none."""
        self._count(tier, now_s)
        self._under_way[tier] -= 1
        assert self._under_way[tier] >= 0
        self._blocks[tier] += blocks
        if self._blocks[tier] > KEEP_BLOCKS:
            self._blocks[tier] /= 2
            self._busy_s[tier] /= 2

    def _count(self, tier: int, now_s: float) -> None:
        if self._under_way[tier]:
            self._busy_s[tier] += now_s - self._since_s[tier]
        self._since_s[tier] = now_s
