"""``tracehaul host offer`` and ``measure``, for ``tracehaul doctor`` on two hosts at a time, and ``certificates``."""

import asyncio
import sys
from typing import Annotated

import msgspec
import typer

from cluster.hosts.certificates import certificates_command
from cluster.hosts.pair import Offer, Questions, measure, offer
from cluster.rundir import ClusterFault
from tracehaul.transfer.place import Place
from tracehaul.wire.errors import TransferError

KindOption = Annotated[str, typer.Option(help="The transport to try.")]
PlaceOption = Annotated[str, typer.Option(help="Where the data plane is, as JSON.")]


def offer_command(
    kind: KindOption, place: PlaceOption, port: Annotated[int, typer.Option(help="Of the control plane's trial.")]
) -> None:
    """Let other hosts try this one, until standard input ends; prints what they need, as JSON."""
    try:
        asyncio.run(_offer(kind, msgspec.json.decode(place, type=Place), port))
    except (OSError, TransferError, msgspec.DecodeError) as error:
        raise ClusterFault(f"cannot offer {kind}: {error}") from error


async def _offer(kind: str, place: Place, port: int) -> None:
    ended = asyncio.Event()
    told: asyncio.Future[Offer] = asyncio.get_running_loop().create_future()
    offering = asyncio.create_task(offer(kind, place, port, ended, told))
    await asyncio.wait((offering, told), return_when=asyncio.FIRST_COMPLETED)
    if told.done():
        sys.stdout.write(msgspec.json.encode(told.result()).decode() + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)
        ended.set()
    await offering


def measure_command(kind: KindOption, place: PlaceOption) -> None:
    """Try what other hosts offer, as standard input says in JSON; prints what was found."""
    try:
        questions = msgspec.json.decode(sys.stdin.buffer.read(), type=Questions)
        answers = asyncio.run(measure(kind, msgspec.json.decode(place, type=Place), questions))
    except (OSError, TransferError, msgspec.DecodeError) as error:
        raise ClusterFault(f"cannot try {kind}: {error}") from error
    sys.stdout.write(msgspec.json.encode(answers).decode())


def register(app: typer.Typer) -> None:
    """Adds them to ``tracehaul host``."""
    app.command("offer", hidden=True)(offer_command)
    app.command("measure", hidden=True)(measure_command)
    app.command("certificates", hidden=True)(certificates_command)
