"""Between the rooms' words and a database's: its texts, and its errors."""

from collections.abc import Generator
from contextlib import contextmanager

from sqlalchemy.exc import SQLAlchemyError

from records.base import RecordsLost


def escaped(text: str) -> str:
    """A client's text as a database takes it: PostgreSQL has no character of number 0."""
    return text.replace("\x1b", "\x1b1").replace("\0", "\x1b0")


def plain(text: str) -> str:
    """Inverse of :func:`escaped`."""
    return text.replace("\x1b0", "\0").replace("\x1b1", "\x1b")


@contextmanager
def translated() -> Generator[None, None, None]:
    """What goes wrong in a database is :class:`records.base.RecordsLost`."""
    try:
        yield
    except TimeoutError as error:
        raise RecordsLost("it does not answer in time") from error
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise RecordsLost(str(cause).splitlines()[0] if str(cause) else type(cause).__name__) from error
    except OSError as error:
        raise RecordsLost(str(error)) from error
