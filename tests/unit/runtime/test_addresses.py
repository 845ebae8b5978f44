import socket

import pytest

from tracehaul.runtime.addresses import BadAddress, announced, bound


@pytest.mark.parametrize(
    ("listen", "address", "told"),
    [
        ("127.0.0.1", "", "127.0.0.1"),
        ("::1", "", "::1"),
        ("10.0.0.2", "", "10.0.0.2"),
        ("0.0.0.0", "10.0.0.2", "10.0.0.2"),
        ("::", "gpu-7.rack", "gpu-7.rack"),
        ("10.0.0.2", "gpu-7", "gpu-7"),
        ("127.0.0.1", "localhost", "localhost"),
        ("::1", "127.0.0.1", "127.0.0.1"),
        ("localhost", "", "localhost"),
    ],
)
def test_what_peers_are_told(listen: str, address: str, told: str) -> None:
    assert announced(listen, address) == told


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("0.0.0.0", ""),
        ("::", ""),
        ("10.0.0.2", "0.0.0.0"),
        ("0.0.0.0", "::"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "::1"),
        ("::", "::ffff:127.0.0.1"),
        ("10.0.0.2", "127.0.1.1"),
        ("0.0.0.0", "localhost"),
        ("10.0.0.2", "LocalHost."),
        ("10.0.0.2", "db.localhost"),
    ],
)
def test_what_reaches_nobody_is_refused(listen: str, address: str) -> None:
    with pytest.raises(BadAddress, match="say "):
        announced(listen, address)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_port_of_ones_own_and_one_that_is_fixed(host: str) -> None:
    with bound(host, 0) as first:
        port = first.getsockname()[1]
        socket.create_connection((host, port), timeout=5).close()
        with pytest.raises(OSError, match=f"cannot listen at {host} port {port}"):
            bound(host, port)
    with bound(host, port) as again:
        assert again.getsockname()[1] == port


def test_all_addresses_are_those_of_both_families() -> None:
    with bound("::", 0) as both:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, both.getsockname()[1]), timeout=5).close()


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(OSError, match=r"cannot listen at 192\.0\.2\.1"):
        bound("192.0.2.1", 0)
