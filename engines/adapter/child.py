"""A stock server that its worker starts, and that ends with it."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.adapter.watch import ServerLost

KILL_MARGIN_S = 2.0


class Child:
    """The process that keeps it (:mod:`engines.adapter.server_keeper`), and its group."""

    def __init__(self, process: asyncio.subprocess.Process, grace_s: float) -> None:
        self._process = process
        self._grace_s = grace_s

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str], log: Path, grace_s: float) -> "Child":
        """Its output goes on where that of its last life ended.

        Raises:
            OSError: it cannot be started.
        """
        keeper = [sys.executable, "-m", "engines.adapter.server_keeper", str(grace_s)]
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *keeper,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | environment,
                start_new_session=True,
            )
        return cls(process, grace_s)

    @property
    def pid(self) -> int:
        """Of its group, too."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """What it ended with; None while it runs."""
        return self._process.returncode

    async def ended(self) -> None:
        """Wait until it has: which is the end of its worker. Raises ServerLost then."""
        code = await self._process.wait()
        raise ServerLost(f"the engine's server has ended with code {code}")

    async def stop(self) -> None:
        """End it and all that it has started."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._grace_s + KILL_MARGIN_S):
                    await self._process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        await self._process.wait()
