"""``tracehaul host offer`` and ``measure``, for ``tracehaul doctor`` on two hosts at a time, and ``certificates``."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cluster.hosts.certificates import certificates_command
from cluster.hosts.pair import Offer, Questions, Trial, measure, offer
from cluster.rundir import ClusterFault
from tracehaul.runtime.credentials import Credentials
from tracehaul.transfer.place import Place
from tracehaul.wire.errors import TransferError

KindOption = Annotated[str, typer.Option(help="The transport to try.")]
PlaceOption = Annotated[str, typer.Option(help="Where the data plane is, as JSON.")]


SecretsOption = Annotated[str, typer.Option(help="The folder of certificates; empty: all is plain.")]
DataOption = Annotated[str, typer.Option(help="As in [security].")]


def offer_command(
    kind: KindOption,
    place: PlaceOption,
    port: Annotated[int, typer.Option(help="Of the control plane's trial.")],
    secrets: SecretsOption = "",
    data: DataOption = "plain",
) -> None:
    """Let other hosts try this one, until standard input ends; prints what they need, as JSON."""
    try:
        asyncio.run(_offer(_trial(kind, place, secrets, data), port))
    except (OSError, TransferError, msgspec.DecodeError) as error:
        raise ClusterFault(f"cannot offer {kind}: {error}") from error


def _trial(kind: str, place: str, secrets: str, data: str) -> Trial:
    credentials = Credentials(Path(secrets).expanduser()) if secrets else None
    return Trial(kind, msgspec.json.decode(place, type=Place), credentials, data)


async def _offer(trial: Trial, port: int) -> None:
    ended = asyncio.Event()
    told: asyncio.Future[Offer] = asyncio.get_running_loop().create_future()
    offering = asyncio.create_task(offer(trial, port, ended, told))
    await asyncio.wait((offering, told), return_when=asyncio.FIRST_COMPLETED)
    if told.done():
        sys.stdout.write(msgspec.json.encode(told.result()).decode() + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)
        ended.set()
    await offering


def measure_command(
    kind: KindOption, place: PlaceOption, secrets: SecretsOption = "", data: DataOption = "plain"
) -> None:
    """Try what other hosts offer, as standard input says in JSON; prints what was found."""
    try:
        questions = msgspec.json.decode(sys.stdin.buffer.read(), type=Questions)
        answers = asyncio.run(measure(_trial(kind, place, secrets, data), questions))
    except (OSError, TransferError, msgspec.DecodeError) as error:
        raise ClusterFault(f"cannot try {kind}: {error}") from error
    sys.stdout.write(msgspec.json.encode(answers).decode())


def register(app: typer.Typer) -> None:
    """Adds them to ``tracehaul host``."""
    app.command("offer", hidden=True)(offer_command)
    app.command("measure", hidden=True)(measure_command)
    app.command("certificates", hidden=True)(certificates_command)
