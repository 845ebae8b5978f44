"""A process with one transport and one memory, told over pipes what to do; and the handle its parent holds.

Run as a program it is the process: one JSON command per line in, one JSON reply per line out, many at once.
"""

import asyncio
import base64
import contextlib
import itertools
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from tracehaul.runtime.credentials import Credentials
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer import poller
from tracehaul.transfer.base import Copy, Region, Transfer, TransferTimedOut
from tracehaul.transfer.memory import allocate
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.errors import ClusterError


class Failed(Exception):
    """A transfer failed in the other process, with this error code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Died(AssertionError):
    """The other process ended by itself; ``code`` is minus the signal's number where it was one."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the process ended with {code}")
        self.code = code


class Call:
    """A command that was sent and not awaited yet."""

    def __init__(self, peer: "Peer", number: int) -> None:
        self._peer = peer
        self._number = number

    def result(self) -> Any:
        """Wait for the reply."""
        return self._peer.reply(self._number)


class Peer:
    """The parent's handle on such a process."""

    def __init__(
        self,
        kind: str,
        owner: str,
        nbytes: int,
        pull: str = "request",
        place: Any = None,
        nap_s: float | None = None,
        secrets: Path | None = None,
    ) -> None:
        """``secrets`` is the folder of its certificate, if it has one. ``place``, a ``bench.common.processes.Place``,
        is where it runs; by default here. ``nap_s``: how long its data plane waits for what its descriptors tell; by
        default as long as anybody's."""
        before, environment = (place.command, place.environment) if place is not None else ((), {})
        self._numbers = itertools.count()
        self._replies: dict[int, Any] = {}
        self.process = subprocess.Popen(
            [
                *before,
                sys.executable,
                "-X",
                "faulthandler",
                __file__,
                kind,
                owner,
                str(nbytes),
                pull,
                json.dumps(nap_s),
                str(secrets or ""),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **{"UCX_TLS": "tcp", "NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "fatal"},
                **os.environ,
                **environment,
            },
            text=True,
            bufsize=1,
        )
        self._hello: RegionDescriptor | None = None

    @property
    def descriptor(self) -> RegionDescriptor:
        """Waits until the process is up."""
        if self._hello is None:
            assert self.process.stdout is not None
            hello = json.loads(self.process.stdout.readline())
            self._hello = unpack_descriptor(hello["descriptor"])
            with open(f"/proc/{self.process.pid}/fd/{hello['fd']}", "r+b") as file:
                self._memory = mmap.mmap(file.fileno(), 0)
        return self._hello

    def send(self, do: str, **arguments: Any) -> Call:
        """Send a command."""
        _ = self.descriptor
        number = next(self._numbers)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"number": number, "do": do, **arguments}) + "\n")
        return Call(self, number)

    def reply(self, number: int) -> Any:
        """Wait for one reply; others are kept."""
        while number not in self._replies:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            if not line:
                raise Died(self.process.wait())
            message = json.loads(line)
            self._replies[message["number"]] = message
        message = self._replies.pop(number)
        if "error" in message:
            raise Failed(message["error"], message["message"])
        return message["value"]

    def start_read(self, remote: RegionDescriptor, copies: list[Copy], timeout_s: float = 10.0) -> Call:
        return self.send("read", remote=pack_descriptor(remote), copies=copies, timeout_s=timeout_s)

    def start_write(self, remote: RegionDescriptor, copies: list[Copy], timeout_s: float = 10.0) -> Call:
        return self.send("write", remote=pack_descriptor(remote), copies=copies, timeout_s=timeout_s)

    def read(self, remote: RegionDescriptor, copies: list[Copy], timeout_s: float = 10.0) -> None:
        self.start_read(remote, copies, timeout_s).result()

    def write(self, remote: RegionDescriptor, copies: list[Copy], timeout_s: float = 10.0) -> None:
        self.start_write(remote, copies, timeout_s).result()

    def poke(self, offset: int, data: bytes) -> None:
        """Set bytes of its memory, whatever state the process is in."""
        _ = self.descriptor
        self._memory[offset : offset + len(data)] = data

    def peek(self, offset: int, nbytes: int) -> bytes:
        """Bytes of its memory, whatever state the process is in."""
        _ = self.descriptor
        return self._memory[offset : offset + nbytes]

    def settled(self, timeout_s: float) -> bool:
        """Whether all transfers that timed out have settled, or do so within ``timeout_s``."""
        return self.send("settled", timeout_s=timeout_s).result()

    def ask(self, attribute: str) -> Any:
        """A plain attribute of the transport."""
        return self.send("attribute", name=attribute).result()

    def close_transfer(self) -> None:
        self.send("close").result()

    def cut(self) -> None:
        """Break all its connections to other processes."""
        self.send("cut").result()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Kill it and close the pipes; harmless if it is dead."""
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def pack_descriptor(remote: RegionDescriptor) -> str:
    return base64.b64encode(msgspec.msgpack.encode(remote)).decode()


def unpack_descriptor(text: str) -> RegionDescriptor:
    return msgspec.msgpack.decode(base64.b64decode(text), type=RegionDescriptor)


def make_transfer(kind: str, owner: str, pull: str, secrets: str = "") -> Transfer:
    if kind == "shm":
        from tracehaul.transfer.shm import ShmTransfer

        return ShmTransfer(owner, ThreadOffload("copy"))
    if kind == "tcp":
        from tracehaul.transfer.tcp import TcpTransfer
        from tracehaul.transfer.tcp_proof import Guard

        return TcpTransfer(owner, guard=Guard(Credentials(Path(secrets)), pull == "tls") if secrets else None)
    if kind == "ucxx":
        from tracehaul.transfer.ucxx import UcxxTransfer

        return UcxxTransfer(owner)
    from tracehaul.transfer.nixl import NixlTransfer

    assert pull in ("read", "request")
    return NixlTransfer(owner, "read" if pull == "read" else "request")


def cut_connections() -> None:
    """Shut every connected TCP socket of this process, whoever's it is."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                connection.getpeername()  # fails for one that listens: new connections must be possible
                connection.shutdown(socket.SHUT_RDWR)


class Program:
    """The process's side."""

    def __init__(self, transfer: Transfer, region: Region) -> None:
        self.transfer = transfer
        self.region = region
        self.settling: list[asyncio.Future[None]] = []

    async def handle(self, command: dict[str, Any]) -> None:
        reply: dict[str, Any] = {"number": command["number"]}
        try:
            reply["value"] = await self.do(command)
        except ClusterError as error:
            if isinstance(error, TransferTimedOut):
                self.settling.append(error.settled)
            reply |= {"error": error.code, "message": str(error)}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()

    async def do(self, command: dict[str, Any]) -> Any:
        match command["do"]:
            case "read" | "write" as way:
                move = self.transfer.read if way == "read" else self.transfer.write
                copies = [Copy(*copy) for copy in command["copies"]]
                remote = unpack_descriptor(command["remote"])
                start_s = asyncio.get_running_loop().time()
                await move(remote, self.region, copies, timeout_s=command["timeout_s"])
                return asyncio.get_running_loop().time() - start_s
            case "settled":
                if self.settling:
                    await asyncio.wait(self.settling, timeout=command["timeout_s"])
                return all(future.done() for future in self.settling)
            case "attribute":
                return getattr(self.transfer, command["name"])
            case "cpu":
                usage = resource.getrusage(resource.RUSAGE_SELF)
                return usage.ru_utime + usage.ru_stime
            case "cut":
                cut_connections()
            case "close":
                await self.transfer.close()
            case other:
                raise AssertionError(other)


async def serve(program: Program) -> None:
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks: set[asyncio.Task[None]] = set()
    while line := await reader.readline():
        task = asyncio.create_task(program.handle(json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def main() -> None:
    kind, owner, nbytes, pull, nap_s, secrets = sys.argv[1:]
    if json.loads(nap_s) is not None:
        poller.WATCHFUL_NAP_MAX_S = json.loads(nap_s)
    transfer = make_transfer(kind, owner, pull, secrets)
    memory = allocate(int(nbytes), "peer")
    region = transfer.register(memory)
    sys.stdout.write(json.dumps({"descriptor": pack_descriptor(region.descriptor), "fd": memory.fd}) + "\n")
    sys.stdout.flush()
    asyncio.run(serve(Program(transfer, region)))


if __name__ == "__main__":
    main()
