"""A PostgreSQL server of one's own; tests that need one are skipped aloud where it is not installed."""

from collections.abc import Generator
from contextlib import contextmanager

import pytest

from bench.common import postgres as programs
from bench.common.postgres import NoPostgres, Postgres

__all__ = ["Postgres", "postgres"]


@contextmanager
def postgres() -> Generator[Postgres, None, None]:
    """One that runs."""
    try:
        found = programs.found()
    except NoPostgres as why:
        pytest.skip(str(why))
    with programs.postgres(found) as server:
        yield server
