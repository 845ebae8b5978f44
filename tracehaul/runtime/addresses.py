"""Where a process listens, and what it tells its peers: two things, and the second is never one that nobody reaches."""

import ipaddress
import socket

BACKLOG = 512


class BadAddress(OSError):
    """Peers could not reach what was to be announced: say another address."""


def literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that ``host`` is; None: it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def announced(listen: str, address: str = "") -> str:
    """The host that peers are told: ``address``, a literal or a name; if that is empty, what is bound, ``listen``.

    Raises:
        BadAddress: it stands for no host, or for whichever host asks.
    """
    host = address or listen
    known = literal(host)
    if known is not None and known.is_unspecified:
        raise BadAddress(f"{host} names no host: say the address that others reach this one by")
    if _is_loopback(host) and not _is_loopback(listen):
        raise BadAddress(f"{host} is each host's own: bound to {listen}, say an address that others reach it by")
    return host


def bound(host: str, port: int, backlog: int = BACKLOG) -> socket.socket:
    """A socket that listens at an address of this host, which may be given by name; port 0: any free one.

    ``::`` takes IPv4 as well. Blocks while a name is looked up.

    Raises:
        OSError: it cannot be bound.
    """
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    dual = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            place,  # pyright: ignore[reportArgumentType] - typed for two parts, an IPv6 place has four
            family=family,
            backlog=backlog,
            dualstack_ipv6=dual,
        )
    except OSError as error:
        raise OSError(error.errno, f"cannot listen at {host} port {port}: {error.strerror}") from error


def _is_loopback(host: str) -> bool:
    known = literal(host)
    if known is None:
        return host.lower().rstrip(".").rpartition(".")[2] in ("localhost", "ip6-localhost", "ip6-loopback")
    mapped = known.ipv4_mapped if isinstance(known, ipaddress.IPv6Address) else None
    return (mapped or known).is_loopback
