"""What is kept by a name: :class:`Documents`. It has one contract suite, whatever they are kept in."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

LIST_BYTES_MAX = 16 << 20


class Shelf(NamedTuple):
    """Where documents are told apart from others: what they are, and whose."""

    kind: str
    tenant: str


class Mark(NamedTuple):
    """Where a document is in the order of its shelf."""

    at_us: int
    """Unix time, in microseconds."""
    name: str


class Document(NamedTuple):
    """One of them."""

    name: str
    """The only one of its shelf."""
    at_us: int
    """As in :class:`Mark`."""
    tags: Mapping[str, str]
    """What it can be looked for by."""
    body: bytes

    @property
    def mark(self) -> Mark:
        """Where it is."""
        return Mark(self.at_us, self.name)


class Documents(Protocol):
    """Of one event loop; any number of callers at a time. Everything may raise
    :class:`records.base.RecordsLost`, and then nobody knows whether it was done."""

    async def put(self, shelf: Shelf, document: Document) -> None:
        """It is durable on return. One of that name is replaced."""
        ...

    async def get(self, shelf: Shelf, name: str) -> Document | None:
        """None: there is none."""
        ...

    async def list(
        self, shelf: Shelf, tags: Mapping[str, str], after: Mark | None, limit: int, *, newest_first: bool = False
    ) -> Sequence[Document]:
        """At most ``limit`` of those that have all of these tags, in order, from behind ``after`` on: fewer where their
        bodies are long (:data:`LIST_BYTES_MAX`), one at least if there is one."""
        ...

    async def tag(self, shelf: Shelf, name: str, tags: Mapping[str, str]) -> bool:
        """These are its tags from now on. False: there is none."""
        ...

    async def swap(self, shelf: Shelf, document: Document, before: Mapping[str, str] | None) -> bool:
        """As :meth:`put`, if the one of that name has just these tags; None: if there is none. False: it is otherwise,
        and nothing changed."""
        ...

    async def delete(self, shelf: Shelf, names: Sequence[str]) -> int:
        """How many of them there were."""
        ...

    async def adopt(self, shelf: Shelf) -> Sequence[str]:
        """What is on shelves of its kind that are routers', by their names, which live no more, is on this router's
        from now on; returns what it is called. Whoever asks first has it: what a router that is believed to be gone
        still puts is on its own shelf."""
        ...

    async def shelves(self, kind: str) -> Sequence[str]:
        """Whose shelves of that kind there are, with something on them."""
        ...

    async def trim(self, kind: str, before_us: int, count_max: int, bytes_max: int) -> int:
        """Forget what is older, and beyond a limit of all tenants' the oldest of the tenant that has most of them.
        Returns how many went."""
        ...

    async def close(self) -> None:
        """Let go of them."""
        ...


def in_excess(sizes: Mapping[str, tuple[int, int]], count_max: int, bytes_max: int) -> tuple[str, int, int] | None:
    """The tenant whose oldest documents go, and how many documents and bytes there are beyond the limits; None: none.

    ``sizes``: of each tenant, documents and bytes.
    """
    count = sum(count for count, _ in sizes.values()) - count_max
    nbytes = sum(nbytes for _, nbytes in sizes.values()) - bytes_max
    if count <= 0 and nbytes <= 0:
        return None
    measure = 1 if nbytes > 0 else 0
    return max(sizes, key=lambda tenant: (sizes[tenant][measure], tenant)), count, nbytes


def fitting(sizes: Iterable[int]) -> int:
    """How many of a list are told at once, which are of so many bytes."""
    nbytes = count = 0
    for size in sizes:
        nbytes += size
        if count and nbytes > LIST_BYTES_MAX:
            break
        count += 1
    return count


def cut(oldest: Iterable[tuple[str, int]], count: int, nbytes: int) -> list[str]:
    """Names of those that go, of names and sizes, for so many documents and bytes to be gone."""
    names: list[str] = []
    for name, size in oldest:
        if count <= 0 and nbytes <= 0:
            break
        names.append(name)
        count, nbytes = count - 1, nbytes - size
    return names
