"""Batches in a folder, for tests."""

from pathlib import Path
from typing import Any

from jobs.batches import Batches
from jobs.folder.batches import FolderBatches
from jobs.folder.files import FolderFiles
from tracehaul.runtime.offload import Offload


def folder_batches(folder: Path, files: FolderFiles, offload: Offload, live_max: int, **more: Any) -> Batches:
    store = FolderBatches(folder, files, offload, offload)
    return Batches(store, store.found, offload, live_max, **more)
