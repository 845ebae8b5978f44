"""How fast an engine is, measured before it serves: by one worker, for all of its kind on this host."""

import platform
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
from blake3 import blake3

from tracehaul.runtime import clock, kept
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload
from worker.host import WorkerHost
from worker.iteration import Measured

log = Log(__name__)

KEPT_S = 3600.0
"""Then it is measured anew: whatever else ran at the time made it look slower."""
FILES_MAX = 64
TOKENS = 64
"""Twice so many and one more are computed: 0.2 s where a token takes a millisecond. More tell hardly more."""
WAIT_S = 30.0
"""For another worker that measures; after that this one does, too."""


class _Calibration(msgspec.Struct, frozen=True):
    when_s: float
    """Unix time."""
    iterations: tuple[Measured, ...]


async def calibrate(host: WorkerHost, folder: Path, offload: Offload) -> None:
    """Tell ``host`` how fast its engine is: what is kept in ``folder``, or else measured now, and kept there.

    Nothing else may run on the engine meanwhile. What it does later corrects its rates.
    """
    info = host.engine.info
    began_s = clock.now_s()
    path = folder / blake3(f"{info.layout.root().hex()} {info.hardware} {platform.node()}".encode()).hexdigest(16)
    known = _read(path) if info.hardware else None
    if known is None:
        with ExitStack() as stack:
            is_ours = bool(info.hardware) and await offload.run(lambda: _take_turn(stack, folder))
            known = _read(path) if is_ours else None
            if known is None:
                measured = await host.loop.calibrate(min(TOKENS, host.config.chunk_tokens))
                if is_ours and measured:
                    _write(path, _Calibration(clock.wall_s(), tuple(measured)))
    host.loop.learn(known or ())
    log.info("calibrated", measured=known is None, seconds=clock.now_s() - began_s, **host.loop.meter.rates._asdict())


def _take_turn(stack: ExitStack, folder: Path) -> bool:
    """Whether nobody else measures, until ``stack`` ends; blocks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return stack.enter_context(kept.alone(folder / "lock", WAIT_S))
    except OSError as error:
        log.warning("calibrations are not kept: each start measures", folder=folder, reason=error)
        return False


def _read(path: Path) -> Sequence[Measured] | None:
    content = kept.read(path)
    if content is None:
        return None
    try:
        found = msgspec.json.decode(content, type=_Calibration)
    except msgspec.MsgspecError:
        return None
    return found.iterations if 0 <= clock.wall_s() - found.when_s < KEPT_S else None


def _write(path: Path, calibration: _Calibration) -> None:
    try:
        kept.write(path, [msgspec.json.encode(calibration)])
        kept.forget_old(path.parent, "?" * len(path.name) + "*", FILES_MAX)
    except OSError as error:
        log.warning("calibrations are not kept: each start measures", folder=path.parent, reason=error)
