"""``tracehaul host offer`` and ``measure``: what ``tracehaul doctor`` runs on two hosts at a time."""

import asyncio
import sys
from typing import Annotated

import msgspec
import typer

from cluster.hosts.pair import Offer, Questions, measure, offer
from cluster.rundir import ClusterFault
from tracehaul.wire.errors import TransferError

KindOption = Annotated[str, typer.Option(help="The transport to try.")]
ListenOption = Annotated[str, typer.Option(help="What sockets are bound to.")]


def offer_command(
    kind: KindOption,
    listen: ListenOption,
    address: Annotated[str, typer.Option(help="What the others are told.")],
    port: Annotated[int, typer.Option(help="Of the control plane's trial.")],
) -> None:
    """Let other hosts try this one, until standard input ends; prints what they need, as JSON."""
    try:
        asyncio.run(_offer(kind, listen, address, port))
    except (OSError, TransferError) as error:
        raise ClusterFault(f"cannot offer {kind} at {listen}: {error}") from error


async def _offer(kind: str, listen: str, address: str, port: int) -> None:
    ended = asyncio.Event()
    told: asyncio.Future[Offer] = asyncio.get_running_loop().create_future()
    offering = asyncio.create_task(offer(kind, listen, address, port, ended, told))
    await asyncio.wait((offering, told), return_when=asyncio.FIRST_COMPLETED)
    if told.done():
        sys.stdout.write(msgspec.json.encode(told.result()).decode() + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)
        ended.set()
    await offering


def measure_command(kind: KindOption, listen: ListenOption) -> None:
    """Try what other hosts offer, as standard input says in JSON; prints what was found."""
    try:
        questions = msgspec.json.decode(sys.stdin.buffer.read(), type=Questions)
        sys.stdout.write(msgspec.json.encode(asyncio.run(measure(kind, listen, questions))).decode())
    except (OSError, TransferError, msgspec.DecodeError) as error:
        raise ClusterFault(f"cannot try {kind} from {listen}: {error}") from error


def register(app: typer.Typer) -> None:
    """Adds them to ``tracehaul host``."""
    app.command("offer", hidden=True)(offer_command)
    app.command("measure", hidden=True)(measure_command)
