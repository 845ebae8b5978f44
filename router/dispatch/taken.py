"""A batch of what the journal writes, as it is made."""

import asyncio

import msgspec

from records.base import Claim, Marks, TraceName, TraceRow
from router.traces.trace import TraceKey


class Taken(msgspec.Struct):
    """What it is made of."""

    keys: list[TraceKey]
    waiting: dict[TraceKey, list[asyncio.Future[None]]]
    rows: list[TraceRow]
    claims: list[tuple[Claim, Marks]]
    superseded: list[tuple[TraceName, int]]
    expired: list[TraceKey]
    erased: list[TraceKey]
    """The expired, too."""
    nbytes: int = 0
