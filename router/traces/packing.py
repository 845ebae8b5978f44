"""Bodies of changes, packed for a store of records: token ids take half, texts a third. Pure."""

import zlib
from collections.abc import Sequence

from router.traces.changes import Unreadable

VERSION = 2
"""Of a body's form: one that is higher than this cannot be read here. The first was not packed."""
LEVEL = 1
"""A better one takes several times as long for a tenth less."""


def packed(bodies: Sequence[bytes]) -> list[bytes]:
    """Bodies as they are kept; may take milliseconds."""
    return [zlib.compress(body, LEVEL) for body in bodies]


def unpacked(version: int, body: bytes) -> bytes:
    """One again.

    Raises:
        Unreadable: it is none of a version known here.
    """
    if version > VERSION:
        raise Unreadable(f"version {version} is newer than {VERSION}")
    try:
        return body if version == 1 else zlib.decompress(body)
    except zlib.error as error:
        raise Unreadable(f"it is not packed as it should be: {error}") from error
