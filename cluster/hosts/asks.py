"""What a supervisor is asked, over a socket that needs no disk: an abstract name, made of the run directory's.

Whoever has the name is the supervisor of that run directory; the kernel frees it when its holder dies. Such a name has
no owner and no permissions, so both ends ask the kernel who the other is, before anything else. It is known in a whole
network namespace, which containers may share, so it is made of the container's too. One JSON line is asked and one is
answered.
"""

import os
import socket
import struct
from contextlib import suppress
from hashlib import blake2b
from typing import Final

import msgspec

from cluster.hosts.orders import HostReport, Order
from cluster.processes import supervisors_running
from cluster.rundir import ClusterFault, RunDir

LINE_BYTES_MAX: Final = 64 << 20
_CREDENTIALS = struct.Struct("3i")
_TIMEVAL = struct.Struct("ll")
CONNECT_TIMEOUT_S = 5.0
"""For a supervisor to take others who ask, so that there is room for us."""


class Stranger(ClusterFault):
    """Who has the supervisor's name is not ours to ask or to end."""


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
    """Of the supervisor of that run directory, among processes that see each other."""
    try:
        container = os.readlink("/proc/self/ns/pid")
    except OSError:  # a kernel without
        container = ""
    named = f"{container} {run.path}".encode(errors="surrogateescape")
    return f"\0tracehaul-supervisor-{blake2b(named, digest_size=16).hexdigest()}"


def encode(message: Ask | Answer) -> bytes:
    """A line."""
    return msgspec.json.encode(message, enc_hook=str) + b"\n"


def decode_ask(line: bytes) -> Ask:
    """Raises msgspec.DecodeError."""
    return msgspec.json.decode(line, type=Ask, dec_hook=lambda kind, value: kind(value))


def may_ask(peer: socket.socket, run: RunDir) -> bool:
    """Whether who is at the other end may do here what it likes anyway."""
    return _credentials(peer)[1] in trusted(run)


def trusted(run: RunDir) -> set[int]:
    """This user, root, the run directory's owner."""
    users = {0, os.geteuid()}
    with suppress(OSError):
        users.add(run.path.stat().st_uid)
    return users


def supervisor_pid(run: RunDir) -> int | None:
    """Its process, as the kernel says, also where that does not answer; None if there is none.

    Raises:
        Stranger: who has its name is not ours.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        try:
            return _connect(peer, run)
        except OSError as error:  # it is frozen, and so many have asked that it cannot be asked who it is
            running = supervisors_running(run.path, trusted(run))
            if not running:
                raise Stranger(f"{_cannot(run, error)}, and is no process of ours") from error
            return running[0].pid


def _connect(peer: socket.socket, run: RunDir) -> int | None:
    """To who has the address; its process. None: nobody has.

    Raises:
        OSError: somebody has, and takes no connection in time.
        Stranger: as :func:`supervisor_pid`.
    """
    seconds, fraction = divmod(CONNECT_TIMEOUT_S, 1.0)
    # The kernel waits for room, which it does not do for a socket with a timeout of Python's.
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(seconds), int(fraction * 1e6)))
    try:
        peer.connect(address(run))
    except ConnectionRefusedError:
        return None
    if not may_ask(peer, run):
        raise Stranger(f"the supervisor of {run.path} is another user's")
    pid = _credentials(peer)[0]
    if not pid:  # the kernel has no number for it here
        raise Stranger(f"the supervisor of {run.path} is another container's")
    return pid


def _credentials(peer: socket.socket) -> tuple[int, int, int]:
    """The process, the user and the group at the other end."""
    return _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))


def _cannot(run: RunDir, error: OSError) -> str:
    why = "it takes nobody who asks" if isinstance(error, BlockingIOError) else error.strerror
    return f"the supervisor of {run.path} cannot be reached ({why})"


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
        try:
            if _connect(peer, run) is None:
                return None
        except OSError as error:
            raise ClusterFault(_cannot(run, error)) from error
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
