"""A server for each session of clients."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.served import served


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """Where the script of ``server.py`` is served, without ``/v1``."""
    with served(Path(__file__).with_name("server.py")) as url:
        yield url
