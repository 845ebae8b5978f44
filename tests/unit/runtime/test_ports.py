"""Ports that servers are given before they start."""

import socket

import pytest

from tracehaul.runtime import ports
from tracehaul.runtime.ports import PORT_RANGE, free_port


def test_it_is_none_that_the_kernel_gives_itself():
    first = int(PORT_RANGE.read_text().split()[0])
    assert all(port < first for port in (free_port() for _ in range(200)))


def test_it_is_free_at_every_address(monkeypatch: pytest.MonkeyPatch):
    taken = free_port()
    numbers = iter([taken, taken, taken + 1])
    monkeypatch.setattr(
        ports.secrets, "randbelow", lambda _: int(PORT_RANGE.read_text().split()[0]) - 1 - next(numbers)
    )
    with socket.socket() as holder:
        holder.bind(("127.0.0.3", taken))
        assert free_port() == taken + 1
