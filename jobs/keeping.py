"""What keeps batches, their inputs and what their lines were answered: :class:`BatchStore`, wherever that is."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from jobs.batch import Batch
from jobs.files import File, NoRoom
from jobs.lines import Call, Checked, LineError, Table
from jobs.outputs import Outputs


class Lost(Exception):
    """The batch is another's by now; says which."""


async def kept(work: Awaitable[None]) -> None:
    """Raises NoRoom: it could not be, or it is another's."""
    try:
        await work
    except OSError as error:
        raise NoRoom(f"it cannot be kept: {error.strerror or error}") from None
    except Lost as error:
        raise NoRoom(f"another router goes on with it: {error}") from None


class Unreadable(Exception):
    """What was uploaded cannot be read, now or ever; says why."""


class Input(Protocol):
    """A batch's lines; implements :class:`jobs.runner.Source`."""

    async def read(self, line: int) -> Call:
        """That line's call. Raises OSError."""
        ...

    def close(self) -> None:
        """After the last read."""
        ...


class Opened(NamedTuple):
    """What a batch's lines are read from and written to."""

    table: Table
    source: Input
    outputs: Outputs


class BatchStore(Protocol):
    """Of one process. Everything raises OSError, where it cannot be done now; it can be asked for again.

    Every write raises Lost where the batch is another's: then nothing was written.
    """

    async def begin(self, batch: Batch, file: File) -> None:
        """Keep it, and that file as its input, which may be deleted from now on."""
        ...

    async def write(self, batch: Batch) -> None:
        """That is what it is now."""
        ...

    async def forget(self, batch: Batch) -> None:
        """Nothing is known of it any more, which is over."""
        ...

    async def clean(self, batch: Batch) -> None:
        """Its input and its lines go: it is over, and delivered."""
        ...

    async def check(self, batch: Batch, refuse: Callable[[str], LineError | None]) -> Checked:
        """What its input holds. Raises Unreadable."""
        ...

    async def open(self, batch: Batch, checked: Checked) -> Opened:
        """Go on with its lines, which nobody else has."""
        ...

    async def settle(self, batch: Batch, outputs: Outputs) -> None:
        """All its lines have ended: as they are now they are delivered, whoever does."""
        ...

    async def deliver(self, file: File, batch: Batch, outputs: Outputs, *, ok: bool) -> bool:
        """Make a file of lines that ended so, as long as that is; a second time it changes nothing. False: there are
        none. Raises NoRoom."""
        ...
