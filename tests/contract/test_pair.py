"""Two hosts tried against each other as their nodes would speak: plain, proven, encrypted; and with strangers."""

import asyncio
from typing import Any

import pytest

from cluster.hosts.pair import Measured, Offer, Questions, Trial, measure, offer
from tracehaul.runtime.credentials import Credentials
from tracehaul.transfer.place import LOOPBACK


def tried(owner: Trial, reader: Trial) -> Measured:
    """What the one finds of the other."""

    async def main() -> Measured:
        ended = asyncio.Event()
        told: asyncio.Future[Offer] = asyncio.get_running_loop().create_future()
        offering = asyncio.create_task(offer(owner, 0, ended, told))
        async with asyncio.timeout(30):
            found = await measure(reader, Questions({"owner": await told}))
            ended.set()
            await offering
        return found.measured["owner"]

    return asyncio.run(main())


def trial(credentials: Credentials | None, data: str) -> Trial:
    return Trial("tcp", LOOPBACK, credentials, data)


@pytest.mark.parametrize("data", ["plain", "auth", "tls"])
def test_hosts_are_tried_as_their_nodes_would_speak(authority: Any, data: str) -> None:
    found = tried(*(trial(authority.credentials(name), data) for name in ("owner", "reader")))
    assert found.fault == ""
    assert found.ping_s > 0
    assert found.read_bytes_s > 1e6
    assert found.write_bytes_s > 1e6


@pytest.mark.parametrize("data", ["auth", "tls"])
def test_a_host_of_another_ca_is_a_fault_in_a_few_words(authority: Any, stranger: Any, data: str) -> None:
    ours = trial(authority.credentials("owner"), data)
    assert "certificate is refused: of an unknown CA" in tried(ours, trial(stranger.credentials("reader"), data)).fault
    assert "cannot connect to" in tried(ours, trial(None, "plain")).fault


def test_what_differs_on_the_data_plane_alone_is_found(authority: Any) -> None:
    owner, reader = authority.credentials("owner"), authority.credentials("reader")
    found = tried(trial(owner, "tls"), trial(reader, "auth"))
    assert found.fault.startswith("tcp: ")
    assert found.ping_s > 0
