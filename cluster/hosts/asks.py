"""What a supervisor is asked, over a socket that needs no disk: an abstract name, made of the run directory's.

Whoever has the name is the supervisor of that run directory; the kernel frees it when its holder dies. Such a name has
no owner and no permissions, so both ends ask the kernel who the other is. One JSON line is asked and one is answered.
"""

import os
import socket
import struct
from hashlib import blake2b
from typing import Final

import msgspec

from cluster.hosts.orders import HostReport, Order
from cluster.rundir import ClusterFault, RunDir

LINE_BYTES_MAX: Final = 64 << 20
_CREDENTIALS = struct.Struct("3i")
CONNECT_TIMEOUT_S = 5.0


class Apply(msgspec.Struct, frozen=True, tag="apply"):
    """Make it so. Answered when what had to stop has stopped."""

    order: Order


class Status(msgspec.Struct, frozen=True, tag="status"):
    """How are they?"""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End these nodes; of all, and then the supervisor, if none is named."""

    names: tuple[str, ...] = ()


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """End, and let the nodes live on: another supervisor follows them."""


class Restart(msgspec.Struct, frozen=True, tag="restart"):
    """End these nodes, the dead ones too, and start them; all if none is named."""

    names: tuple[str, ...] = ()


Ask = Apply | Status | Stop | Leave | Restart


class Told(msgspec.Struct, frozen=True, tag="told"):
    """How the host is after what was asked."""

    report: HostReport


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Nothing was done."""

    why: str


Answer = Told | Refused


def address(run: RunDir) -> str:
    """Of the supervisor of that run directory."""
    return f"\0tracehaul-supervisor-{blake2b(os.fsencode(run.path), digest_size=16).hexdigest()}"


def encode(message: Ask | Answer) -> bytes:
    """A line."""
    return msgspec.json.encode(message, enc_hook=str) + b"\n"


def decode_ask(line: bytes) -> Ask:
    """Raises msgspec.DecodeError."""
    return msgspec.json.decode(line, type=Ask, dec_hook=lambda kind, value: kind(value))


def may_ask(peer: socket.socket, run: RunDir) -> bool:
    """Whether who is at the other end may do here what it likes anyway: this user, root, the run directory's owner."""
    uid = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1]
    if uid in (0, os.geteuid()):
        return True
    try:
        return uid == run.path.stat().st_uid
    except OSError:
        return False


def supervisor_pid(run: RunDir) -> int | None:
    """Its process, as the kernel says, also where that does not answer; None if there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(CONNECT_TIMEOUT_S)
        try:
            peer.connect(address(run))
        except OSError:
            return None
        return _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]


def ask(run: RunDir, question: Ask, *, timeout_s: float) -> HostReport | None:
    """The report after it; None if there is no supervisor.

    Raises:
        ClusterFault: it is refused, or not answered in time.
    """
    answer = _asked(run, question, timeout_s)
    if isinstance(answer, Unanswered) and isinstance(question, Status):  # it ended just then
        answer = _asked(run, question, timeout_s)
    match answer:
        case None:
            return None
        case Told(report):
            return report
        case Refused(why):
            raise ClusterFault(why)
        case Unanswered(why):
            raise ClusterFault(f"the supervisor of {run.path} {why}")


class Unanswered(msgspec.Struct, frozen=True):
    """What became of a question."""

    why: str


def _asked(run: RunDir, question: Ask, timeout_s: float) -> Answer | Unanswered | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(CONNECT_TIMEOUT_S)
        try:
            peer.connect(address(run))
        except ConnectionRefusedError:
            return None
        except OSError as error:
            raise ClusterFault(f"the supervisor of {run.path} cannot be reached: {error}") from error
        if not may_ask(peer, run):
            raise ClusterFault(f"the supervisor of {run.path} is another user's")
        peer.settimeout(timeout_s)
        try:
            peer.sendall(encode(question))
            with peer.makefile("rb") as file:
                line = file.readline(LINE_BYTES_MAX)
        except TimeoutError:
            return Unanswered(f"has not answered for {timeout_s:.0f} s")
        except OSError as error:
            return Unanswered(f"ended: {error}")
    if not line:
        return Unanswered("ended, or does not answer this user")
    try:
        return msgspec.json.decode(line, type=Answer)
    except msgspec.DecodeError as error:
        return Unanswered(f"is of another version: {error}")
