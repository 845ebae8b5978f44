"""What a dialect is: a form in which clients ask and are answered."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from router.calls.call import Call
from router.calls.errors import CallFailed
from router.calls.events import CallEvent, Choice, Usage
from router.calls.text import Text


class Models(Protocol):
    """The models that may be asked for."""

    def named(self, name: str | None) -> str:
        """What a call asks for that says this; the first model's name where it says none."""
        ...

    def text(self, model: str) -> Text:
        """Of that model; of any other where it is not known, for a call that will be refused."""
        ...


class Teller(Protocol):
    """Tells one call's answer, as a stream or whole."""

    def events(self, events: Iterable[CallEvent]) -> bytes:
        """What a stream tells of what happened; may be nothing."""
        ...

    def end(self, usage: Usage) -> bytes:
        """How a stream ends, after all choices have."""
        ...

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The body of a call that does not stream."""
        ...


T_co = TypeVar("T_co", bound=Teller, covariant=True)


class Dialect(Protocol[T_co]):
    """One form. Knows a call's body and the bytes of its answer; everything between is the same for all."""

    @property
    def keepalive(self) -> bytes:
        """What a stream says in silence."""
        ...

    def read(self, body: bytes, fresh: str, created: int, models: Models) -> tuple[Call, T_co]:
        """What a body asks for, and who tells the answer.

        Args:
            body: as the client sent it.
            fresh: told from all others, for the call's name.
            created: seconds since 1970.
            models: name the one that is meant where the body names none, and read the tokens that logprobs are of.

        Raises:
            CallFailed: it is no body of this dialect, or asks for what cannot be honoured.
        """
        ...

    def failed(self, failure: CallFailed) -> bytes:
        """The body of a call that failed before its answer began."""
        ...

    def broken(self, failure: CallFailed) -> bytes:
        """The end of a stream that fails after it began."""
        ...
