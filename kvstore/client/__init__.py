"""Reading from and writing to every store node: what workers hold."""

from kvstore.client.client import ClientStats, StoreClient
from kvstore.client.staging import Staging, StagingBuffer
from kvstore.client.writer import OutgoingBlock, PutOutcome

__all__ = ["ClientStats", "OutgoingBlock", "PutOutcome", "Staging", "StagingBuffer", "StoreClient"]
