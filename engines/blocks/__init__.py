"""The store for an engine in a process of its own: blocking calls, pages that stay the engine's, nothing raised."""

from engines.blocks.config import EngineConfig, EngineRefused
from engines.blocks.pages import HostPage, Page
from engines.blocks.store import EngineStore

__all__ = ["EngineConfig", "EngineRefused", "EngineStore", "HostPage", "Page"]
