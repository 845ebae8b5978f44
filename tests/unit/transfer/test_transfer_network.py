"""Which transport is taken for the network: NIXL if it is there, else UCXX, and never both."""

import logging

import pytest

from tracehaul.transfer import network, nixl, ucxx
from tracehaul.wire.errors import TransferError


class Opened:
    """Stands for a transport."""

    def __init__(self, owner: str) -> None:
        self.pull = "request"


@pytest.mark.parametrize(
    ("there", "opened", "why"),
    [
        ({"nixl_cu12", "ucxx"}, "NixlTransfer", "installed"),
        ({"nixl"}, "NixlTransfer", "installed"),
        ({"ucxx"}, "UcxxTransfer", "NIXL is not installed"),
    ],
)
def test_the_log_says_which_and_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, there: set[str], opened: str, why: str
) -> None:
    taken: list[str] = []

    def stand_in(name: str) -> type[Opened]:
        class Stand(Opened):
            def __init__(self, owner: str) -> None:
                super().__init__(owner)
                taken.append(name)

        return Stand

    monkeypatch.setattr(network, "installed", lambda *packages: not there.isdisjoint(packages))
    monkeypatch.setattr(nixl, "NixlTransfer", stand_in("NixlTransfer"))
    monkeypatch.setattr(ucxx, "UcxxTransfer", stand_in("UcxxTransfer"))
    with caplog.at_level(logging.INFO):
        network.open_network("us#1")
    assert taken == [opened]
    (record,) = [record for record in caplog.records if record.getMessage() == "transport"]
    assert why in str(record.__dict__)


def test_a_nixl_that_fails_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its UCX is in the process by then."""

    def fail(owner: str) -> None:
        raise TransferError("NIXL cannot start")

    monkeypatch.setattr(network, "installed", lambda *packages: True)
    monkeypatch.setattr(nixl, "NixlTransfer", fail)
    with pytest.raises(TransferError, match="cannot start"):
        network.open_network("us#1")


def test_neither_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "installed", lambda *packages: False)
    with pytest.raises(TransferError, match="neither"):
        network.open_network("us#1")


def test_what_is_installed_is_found_without_an_import() -> None:
    assert network.installed("no_such_package", "msgspec")
    assert not network.installed("no_such_package")
