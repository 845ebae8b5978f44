"""Two hosts tried against each other by the very transport that their nodes will use: does it carry, and how fast.

One offers memory and answers pings; others measure it. For ``tracehaul doctor``, before anything is started.
"""

import asyncio
import contextlib
import secrets
import ssl
import statistics
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, NamedTuple

import msgspec

from tracehaul.rpc.tcp import join_address, split_address
from tracehaul.runtime import clock
from tracehaul.runtime.credentials import Credentials, why_refused
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.base import Copy, Region, Transfer
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.opening import open_transport
from tracehaul.transfer.place import Place
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.tcp_proof import Guard
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.errors import TransferError

REGION_BYTES = 64 << 20
PIECE_BYTES = 1 << 20
PINGS = 20
PINGS_S = 0.5
"""No further ping after that: a long way is known by a few."""
PIECES_MIN = 2
CONNECT_S = 5.0
TRANSFER_S = 30.0
TRIAL_S = 2.0
"""About so long what is read may take: over a slow way it is less than the whole region."""


class Trial(NamedTuple):
    """How nodes of these hosts would speak to each other."""

    kind: str
    """Of transport."""
    place: Place
    credentials: Credentials | None
    """None: the control plane is plain."""
    data: str
    """As ``[security] data``."""

    @property
    def guard(self) -> Guard | None:
        """Of the data plane."""
        if self.credentials is None or self.data not in ("auth", "tls"):
            return None
        return Guard(self.credentials, self.data == "tls")

    @property
    def server(self) -> ssl.SSLContext | None:
        """For who is called."""
        return self.credentials.now.server if self.credentials is not None else None

    @property
    def client(self) -> ssl.SSLContext | None:
        """For who calls."""
        return self.credentials.now.client if self.credentials is not None else None


class Offer(msgspec.Struct, frozen=True):
    """What a host lets others try."""

    control: str
    """``host:port`` that answers what it is sent."""
    region: RegionDescriptor


class Measured(msgspec.Struct, frozen=True):
    """What one host found of another."""

    fault: str = ""
    """Why nothing more was measured, in a line; empty: all was."""
    ping_s: float = 0.0
    """Of a byte over the control plane's port and back; median."""
    first_s: float = 0.0
    """Of the first piece, with all that connecting takes."""
    read_bytes_s: float = 0.0
    write_bytes_s: float = 0.0


class Questions(msgspec.Struct, frozen=True):
    """What a host is to find out."""

    offers: dict[str, Offer] = {}
    """By the others' names."""
    addresses: dict[str, str] = {}
    """Of nodes that run, ``host:port``: whether it reaches them."""


class Answers(msgspec.Struct, frozen=True):
    """What it found."""

    measured: dict[str, Measured]
    unreached: dict[str, str]
    """Why, by node."""


async def offer(trial: Trial, port: int, ended: asyncio.Event, told: asyncio.Future[Offer]) -> None:
    """Offer memory, and answer pings at ``port``, until ``ended`` is set; ``told`` gets what others need.

    Raises:
        OSError, TransferError: an address cannot be bound, or the transport does not start here.
    """
    async with _opened(trial) as plane:
        server = await asyncio.start_server(_echo, trial.place.listen, port, ssl=trial.server)
        try:
            control = join_address(trial.place.announced, server.sockets[0].getsockname()[1])
            told.set_result(Offer(control, plane.region.descriptor))
            await ended.wait()
        finally:
            server.close()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while said := await reader.read(64):
            writer.write(said)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def _opened(trial: Trial) -> AsyncGenerator[Plane]:
    """The transport, with memory of its own."""
    async with contextlib.AsyncExitStack() as stack:
        offload = ThreadOffload("pair", 1)
        stack.callback(offload.close)
        memory = allocate(REGION_BYTES, "pair")
        stack.callback(memory.close)
        name = f"pair-{secrets.token_hex(8)}#1"
        transfer = open_transport(trial.kind, name, trial.place, offload, trial.guard).transfer
        stack.push_async_callback(transfer.close)
        yield Plane(transfer, transfer.register(memory))


async def measure(trial: Trial, questions: Questions) -> Answers:
    """Try all that is offered, one after the other.

    Raises:
        OSError, TransferError: the transport does not start here.
    """
    async with _opened(trial) as plane:
        measured = {name: await _measured(trial, *plane, there) for name, there in sorted(questions.offers.items())}
        return Answers(measured, await _unreached(questions.addresses))


async def _measured(trial: Trial, transfer: Transfer, region: Region, there: Offer) -> Measured:
    try:
        ping_s = await _ping(trial, there.control)
    except (OSError, TimeoutError) as error:
        why = why_refused(error) if isinstance(error, ssl.SSLError) else error or "no answer"
        return Measured(fault=f"cannot connect to {there.control}: {why}")
    pieces = [Copy(at, at, PIECE_BYTES) for at in range(0, REGION_BYTES, PIECE_BYTES)]
    try:
        if not transfer.reaches(there.region):
            return Measured(fault=f"{transfer.kind} does not reach it", ping_s=ping_s)
        first_s = await _timed(transfer.read(there.region, region, pieces[:1], timeout_s=TRANSFER_S))
        pieces = pieces[: max(PIECES_MIN, int(TRIAL_S / first_s))]
        nbytes = len(pieces) * PIECE_BYTES
        read_s = await _timed(transfer.read(there.region, region, pieces, timeout_s=TRANSFER_S))
        write_s = await _timed(transfer.write(there.region, region, pieces, timeout_s=TRANSFER_S))
    except TransferError as error:
        return Measured(fault=f"{transfer.kind}: {error}", ping_s=ping_s)
    return Measured("", ping_s, first_s, nbytes / read_s, nbytes / write_s)


async def _timed(work: Coroutine[Any, Any, object]) -> float:
    began_s = clock.perf_s()
    await work
    return clock.perf_s() - began_s


async def _ping(trial: Trial, address: str) -> float:
    host, port = split_address(address)
    async with asyncio.timeout(CONNECT_S):
        client = trial.client
        reader, writer = await asyncio.open_connection(host, port, ssl=client, server_hostname=host if client else None)
        try:
            took: list[float] = []
            for _ in range(PINGS):
                began_s = clock.perf_s()
                writer.write(b".")
                await reader.readexactly(1)
                took.append(clock.perf_s() - began_s)
                if sum(took) > PINGS_S:
                    break
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("it closed the connection") from error
        finally:
            writer.close()
    return statistics.median(took)


async def _unreached(addresses: Mapping[str, str]) -> dict[str, str]:
    async def one(name: str, address: str) -> tuple[str, str]:
        try:
            host, port = split_address(address)
            async with asyncio.timeout(CONNECT_S):
                _, writer = await asyncio.open_connection(host, port)
            writer.close()
        except (OSError, TimeoutError) as error:
            return name, f"cannot connect to {address}: {error or 'no answer'}"
        return name, ""

    found = await asyncio.gather(*(one(name, address) for name, address in sorted(addresses.items())))
    return {name: fault for name, fault in found if fault}
