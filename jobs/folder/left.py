"""What a process that is gone has left in its folder of files and batches, for one that lives to go on with.

Who has a folder locks it, as :class:`jobs.files.Files` does; the lock goes with the process, whatever ends it. Of each
thing its bytes get a second name in the new folder first, then what is known of it moves: so it is in one of the two,
whole, whenever this ends.
"""

import fcntl
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tracehaul.runtime.durable import sync_folder

FILES, BATCHES = "files", "batches"
"""Of each process's folder."""
KNOWN = ".json"


def others(folder: Path) -> list[Path]:
    """Folders beside that one, and the one they are in, as one process may have had that, in which anything is left."""
    return sorted(each for each in (*folder.parent.iterdir(), folder.parent) if each != folder and holds(each))


def holds(folder: Path) -> bool:
    """Whether anything is left there."""
    return any(next((folder / part).glob(f"*{KNOWN}"), None) is not None for part in (FILES, BATCHES))


@contextmanager
def locked(folder: Path) -> Generator[bool, None, None]:
    """Nobody else has it, as long as this is open; False: somebody does. Raises OSError."""
    (folder / FILES).mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(folder / FILES, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(handle)


def moved(source: Path, target: Path, kinds: Sequence[str]) -> list[Path]:
    """Move what is known, and with it what has its name and one of these ends. Returns where it is now. Raises OSError:
    not all of it was."""
    found: list[Path] = []
    for known in sorted(source.glob(f"*{KNOWN}")):
        parts = [path for kind in kinds if (path := source / f"{known.stem}{kind}").exists()]
        for path in parts:
            with suppress(FileExistsError):
                os.link(path, target / path.name)
        sync_folder(target)
        known.rename(target / known.name)
        sync_folder(target)
        found.append(target / known.name)
        for path in parts:
            path.unlink(missing_ok=True)
    return found
