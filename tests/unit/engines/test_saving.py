"""Which puts of a block are spoilt when its place is given to another, without vLLM and without a store."""

from typing import Any, cast

import pytest

from engines.blocks.direct import Beside
from engines.blocks.store import EngineStore
from engines.vllm import saving
from engines.vllm.chains import Move
from engines.vllm.saving import Saving
from kvstore.client import LentBuffer
from tracehaul.wire.ids import BlockHash


class Store:
    """Takes as many blocks as it is told, and none of memory that is not its host's."""

    def __init__(self) -> None:
        self.takes: int | None = 10
        self.besides: list[tuple[Beside, list[LentBuffer]]] = []
        self.later: list[int] = []

    def put_beside(self, keys: Any, parents: Any, pages: list[int], tenant: str) -> Beside | None:
        if self.takes is None:
            return None
        buffers = [LentBuffer(1, 0) for _ in pages[: self.takes]]
        self.besides.append((Beside(buffers), buffers))
        return self.besides[-1][0]

    def put_later(self, keys: Any, parents: Any, pages: list[int], tenant: str) -> int:
        self.later += pages
        return len(pages)


def save(saver: Saving, *blocks: int) -> None:
    keys = [BlockHash(bytes([block])) for block in blocks]
    saver.save(Move("r", keys, keys, list(blocks)), keys, keys, cast(Any, list(blocks)))


def rig() -> tuple[Store, Saving]:
    store = Store()
    return store, Saving(cast(EngineStore, store))


def spoilt(store: Store) -> list[list[bool]]:
    return [[buffer.spoilt for buffer in buffers] for _, buffers in store.besides]


def test_what_changes_is_spoilt_in_every_put_that_it_is_in() -> None:
    store, saver = rig()
    save(saver, 3, 5)
    save(saver, 5, 7)
    saver.changes([5, 9])
    assert spoilt(store) == [[False, True], [True, False]]
    saver.changes([3])
    assert spoilt(store) == [[True, True], [True, False]]


def test_what_was_not_taken_is_in_no_put() -> None:
    store, saver = rig()
    store.takes = 1
    save(saver, 3, 5)
    saver.changes([5])
    assert spoilt(store) == [[False]]


def test_what_cannot_be_read_where_it_is_is_copied() -> None:
    store, saver = rig()
    store.takes = None
    save(saver, 3, 5)
    saver.changes([3])
    assert (store.later, spoilt(store)) == ([3, 5], [])


def test_what_is_over_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "OVER_AT", 4)
    store, saver = rig()
    save(saver, 1, 2)
    save(saver, 3)
    store.besides[0][0].done = True
    save(saver, 1)
    saver.changes([1])
    assert spoilt(store) == [[False, False], [False], [True]], "a put that is over reads nothing any more"
    save(saver, 4, 5, 6)
    save(saver, 7)
    assert 2 not in saver._under_way  # pyright: ignore[reportPrivateUsage]
    saver.changes([3, 4, 7])
    assert spoilt(store)[1:] == [[True], [True], [True, False, False], [True]], "those under way are not"
