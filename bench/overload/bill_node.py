"""A program: :mod:`bench.common.fake_node`, whose engine keeps a clock where it outlives the process (``CLOCK``)."""

import mmap
import os
import struct
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import fake_node
from cluster.cli import main
from tracehaul.engine.base import Result, Work
from tracehaul.runtime import clock
from worker.meter import Meter

CLOCK = struct.Struct("=dd")
"""What a worker's process writes of itself: since when it was ready, and how long its engine was at work."""


class Timed:
    """One worker's."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(CLOCK.pack(0.0, 0.0))
        with path.open("r+b") as file:
            self._kept = mmap.mmap(file.fileno(), CLOCK.size)
        self._began_s = self._worked_s = 0.0

    def began(self) -> None:
        """It is ready to join."""
        self._began_s = self._began_s or clock.wall_s()
        self._keep()

    def around(self, engine: Any) -> Any:
        """The engine, timed."""
        run = engine.run

        async def timed(work: Sequence[Work]) -> Sequence[Result]:
            since_s = clock.perf_s()
            try:
                return await run(work)
            finally:
                self._worked_s += clock.perf_s() - since_s
                self._keep()

        engine.run = timed
        return engine

    def _keep(self) -> None:
        self._kept[:] = CLOCK.pack(self._began_s, self._worked_s)


def install(timed: Timed) -> None:
    """In place of the real engine, and of what tells since when a worker is there."""

    async def load(config: Any) -> Any:
        return timed.around(await fake_node.load(config))

    asked = Meter.up_s

    def up_s(self: Meter, now_s: float) -> float:
        timed.began()
        return asked(self, now_s)

    Meter.up_s = up_s
    fake: Any = types.ModuleType("tracehaul.engine.torch_engine")
    fake.TorchEngine = types.SimpleNamespace(load=load)
    fake.TorchEngineConfig = types.SimpleNamespace
    sys.modules[fake.__name__] = fake


if __name__ == "__main__":
    if sys.argv[2].startswith("decode"):
        install(Timed(Path(os.environ["CLOCK"])))
    main()
