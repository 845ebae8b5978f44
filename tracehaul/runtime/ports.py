"""Ports for servers that are started later."""

import contextlib
import secrets
import socket
from pathlib import Path

PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""From which port to which the kernel takes those that it gives itself."""
PORTS_END = 32768
FIRST_PORT = 1024
PORTS = 12_000
TRIES = 100


def free_port() -> int:
    """A port that nobody uses now at any address of this host, nor is given who asks for any port: a server binds its
    own late in its start, after much that does.

    Raises:
        OSError: there is none.
    """
    try:
        end = int(PORT_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        end = PORTS_END
    for _ in range(TRIES):
        port = end - 1 - secrets.randbelow(max(1, min(PORTS, end - FIRST_PORT)))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no free port was found below {end}")
