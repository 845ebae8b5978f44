"""Reading from and writing to every store node: what workers hold."""

from kvstore.client.client import ClientStats, StoreClient
from kvstore.client.staging import LentBuffer, Staging, StagingBuffer
from kvstore.client.writer import OutgoingBlock, PutOutcome

__all__ = ["ClientStats", "LentBuffer", "OutgoingBlock", "PutOutcome", "Staging", "StagingBuffer", "StoreClient"]
