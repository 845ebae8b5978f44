"""Blocks on their way to the store while the engine goes on: read where they are, unless they change first."""

from collections.abc import Iterable, Sequence

from engines.blocks.direct import Beside
from engines.blocks.pages import Page
from engines.blocks.store import EngineStore
from engines.vllm.chains import Move
from tracehaul.wire.ids import BlockHash

OVER_AT = 4096
"""Once so many blocks are kept, those are forgotten that are read no more."""


class Saving:
    """Of one worker, on its thread.

    A full block stays as it is until the engine gives its place to another, which the scheduler says with the step that
    will do so. What has not been read by then is not published: it is the store's loss, and no step waits.
    """

    def __init__(self, store: EngineStore) -> None:
        self._store = store
        self._under_way: dict[int, list[tuple[Beside, int]]] = {}
        """By block: the puts that it is in, and its place there."""

    def save(self, move: Move, keys: Sequence[BlockHash], parents: Sequence[BlockHash], pages: Sequence[Page]) -> None:
        """Publish these blocks, and wait for nothing but, where memory is not this host's, a copy."""
        if len(self._under_way) >= OVER_AT:
            self._under_way = {block: puts for block, puts in self._under_way.items() if not _over(puts)}
        beside = self._store.put_beside(keys, parents, pages, move.tenant)
        if beside is None:
            self._store.put_later(keys, parents, pages, move.tenant)
            return
        for place, block in enumerate(move.block_ids[: beside.count]):
            puts = [put for put in self._under_way.get(block, ()) if not put[0].done]
            self._under_way[block] = [*puts, (beside, place)]

    def changes(self, blocks: Iterable[int]) -> None:
        """These are about to be written to."""
        for block in blocks if self._under_way else ():
            for beside, place in self._under_way.pop(block, ()):
                beside.spoil(place)


def _over(puts: Sequence[tuple[Beside, int]]) -> bool:
    return all(beside.done for beside, _ in puts)
