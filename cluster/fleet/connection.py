"""Ways to a host: the system's ssh, one connection for all that is asked of it, or this machine itself.

Everything of the user's is used: config, agents, jump hosts, known host keys. Nothing is asked: a key that is not
known, or a password that would be needed, is an error that says so. ``TRACEHAUL_SSH`` replaces the command
(``ssh -F FILE``).
"""

import asyncio
import contextlib
import os
import shlex
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from cluster.fleet.config import LOCAL, HostConfig

SSH = "TRACEHAUL_SSH"
CONNECT_S = 15.0
_HOLD_END_S = 5.0
SSH_FAILED = 255
"""ssh's own exit code, whatever a command would say."""
_SILENCE_S = 5
_SILENCES = 3
"""A host that answers nothing for their product is gone."""
_OPTIONS = {
    "BatchMode": "yes",
    "ControlMaster": "auto",
    "ControlPersist": "60",
    "ServerAliveInterval": str(_SILENCE_S),
    "ServerAliveCountMax": str(_SILENCES),
    "ConnectTimeout": str(int(CONNECT_S)),
    "LogLevel": "ERROR",
}
_HINTS = {
    "Host key verification failed": "its key is not known, or another than before: `ssh {target}` once by hand",
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "its key is another than before: see `ssh {target}`",
    "Permission denied": "no key of yours is accepted there: `ssh-copy-id {target}`, or start an agent",
    "Could not resolve hostname": 'the name is not known: say `ssh = "user@address"`',
    "Connection refused": "no sshd listens there",
    "timed out": "nothing answers at that address: is it up, and the port open?",
    "No route to host": "there is no way to that address",
    "Too many authentication failures": "the agent offers too many keys: say `IdentitiesOnly yes` in ~/.ssh/config",
}


_FRAME = " │╭╮╰╯─"


class HostFault(Exception):
    """A host cannot be reached, or cannot do what it was asked; the message is one line, with what would help."""


class Done(msgspec.Struct, frozen=True):
    """A command's end."""

    code: int
    out: bytes
    err: bytes

    @property
    def last_line(self) -> str:
        """What it said last, without the frame that a wrong use is told in; empty if nothing."""
        lines = (self.err.strip() or self.out.strip()).decode(errors="replace").splitlines()
        return next((said for line in reversed(lines) if (said := line.strip(_FRAME))), "")


class Connection(Protocol):
    """To one host."""

    async def run(self, command: Sequence[str], stdin: bytes | Path = b"", timeout_s: float = 60.0) -> Done:
        """Run a command there; ``stdin``: bytes, or a file of this machine.

        Raises:
            HostFault: it could not be run, or takes longer. What it has begun may go on there.
        """
        ...

    def hold(self, command: Sequence[str], timeout_s: float = 30.0) -> AbstractAsyncContextManager[bytes]:
        """Run a command that says one line and then goes on; the line. Its standard input ends with the context.

        Raises:
            HostFault: it cannot be run, or says nothing in time.
        """
        ...

    async def address(self) -> str:
        """Where it is, as far as this side knows: an address or a name."""
        ...


class Ssh:
    """A host by the system's ssh. The first command opens the connection, later ones share it."""

    def __init__(self, target: str, folder: Path) -> None:
        """``folder``: for the connections' sockets, private, with a short path."""
        self._target = target
        self._ssh = [*shlex.split(os.environ.get(SSH, "ssh")), "-S", str(folder / "%C")]
        for name, value in _OPTIONS.items():
            self._ssh += ["-o", f"{name}={value}"]
        self._opening = asyncio.Lock()
        self._open = False

    async def run(self, command: Sequence[str], stdin: bytes | Path = b"", timeout_s: float = 60.0) -> Done:
        if not self._open:
            async with self._opening:  # of several at once only the first makes the connection
                if not self._open:
                    opened = await self._ask(["true"], b"", CONNECT_S + 5.0)
                    if opened.code != 0:
                        raise HostFault(f"{opened.last_line or 'it runs no command'}")
                    self._open = True
        return await self._ask(command, stdin, timeout_s)

    @asynccontextmanager
    async def hold(self, command: Sequence[str], timeout_s: float = 30.0) -> AsyncGenerator[bytes]:
        await self.run(["true"])
        async with _held([*self._ssh, self._target, "--", shlex.join(command)], timeout_s) as line:
            yield line

    async def _ask(self, command: Sequence[str], stdin: bytes | Path, timeout_s: float) -> Done:
        done = await _run([*self._ssh, self._target, "--", shlex.join(command)], stdin, timeout_s)
        if done.code == SSH_FAILED:
            self._open = False
            said = done.err.decode(errors="replace")
            hint = next((hint for words, hint in _HINTS.items() if words in said), "")
            line = done.last_line or "the connection was lost"
            raise HostFault(f"ssh {self._target}: {line}" + (f"; {hint.format(target=self._target)}" if hint else ""))
        return done

    async def address(self) -> str:
        done = await _run([*self._ssh, "-G", self._target], b"", CONNECT_S)
        for line in done.out.decode(errors="replace").splitlines():
            name, _, value = line.partition(" ")
            if name == "hostname":
                return value
        raise HostFault(f"ssh -G {self._target}: {done.last_line}")

    async def close(self) -> None:
        """End the connection; what runs there goes on."""
        with contextlib.suppress(HostFault):
            await _run([*self._ssh, "-O", "exit", self._target], b"", 5.0)


class Local:
    """This machine."""

    async def run(self, command: Sequence[str], stdin: bytes | Path = b"", timeout_s: float = 60.0) -> Done:
        return await _run(command, stdin, timeout_s)

    @asynccontextmanager
    async def hold(self, command: Sequence[str], timeout_s: float = 30.0) -> AsyncGenerator[bytes]:
        async with _held(command, timeout_s) as line:
            yield line

    async def address(self) -> str:
        return "127.0.0.1"


@asynccontextmanager
async def connections(hosts: Sequence[HostConfig]) -> AsyncGenerator[Mapping[str, Connection]]:
    """One to each host, by its name; nothing is connected before it is used."""
    with tempfile.TemporaryDirectory(prefix="th-", dir="/tmp") as folder:  # short: a socket's path
        ways: dict[str, Connection] = {
            host.name: Local() if host.target == LOCAL else Ssh(host.target, Path(folder)) for host in hosts
        }
        try:
            yield ways
        finally:
            await asyncio.gather(*(way.close() for way in ways.values() if isinstance(way, Ssh)))


@asynccontextmanager
async def _held(command: Sequence[str], timeout_s: float) -> AsyncGenerator[bytes]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(timeout_s):
            line = await process.stdout.readline()
            if not line:
                said = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
                raise HostFault(said[-1].removeprefix("tracehaul: ") if said else "it says nothing")
        yield line
    except TimeoutError:
        raise HostFault(f"no answer within {timeout_s:g} s") from None
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(_HOLD_END_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _run(command: Sequence[str], stdin: bytes | Path, timeout_s: float) -> Done:
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(stdin.open("rb")) if isinstance(stdin, Path) else asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=source, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
        except OSError as error:
            raise HostFault(f"cannot run {command[0]}: {error.strerror}") from error
        try:
            async with asyncio.timeout(timeout_s):
                out, err = await process.communicate(stdin if isinstance(stdin, bytes) else None)
        except TimeoutError:
            raise HostFault(f"no answer within {timeout_s:g} s to: {shlex.join(command[-1:])[:80]}") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
    code = process.returncode
    assert code is not None
    return Done(code, out, err)
