"""Who is let in on the control plane, by certificate, name and token; and changing the CA."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest

from cluster.security.ca import issue, retire, rotate
from cluster.security.laying import lay, lay_ca
from router.fleet.gate import Gate
from router.fleet.members import MemberRegistry
from tests.contract.conftest import LISTEN, Echo, listening
from tracehaul.rpc.base import CallContext, Network
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.session import Limits
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.runtime.credentials import Credentials
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.blocks import Attach, Drain, Subscribe
from tracehaul.wire.cluster import Heartbeat, Join, Members, NodeInfo, NodeLoad
from tracehaul.wire.errors import ClusterError, PeerLost, Untrusted
from tracehaul.wire.ids import Generation, NodeId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.operations import Describe
from tracehaul.wire.steps import PrefillProgress

DAY_S = 86400.0
NOT_IT = "wrong"

Main = Callable[[], Coroutine[Any, Any, None]]


pytestmark = pytest.mark.usefixtures("talkative")


async def refused(network: Network, address: str) -> str:
    """Why no connection comes about."""
    with pytest.raises(ClusterError) as refusal:
        await network.connect(address, timeout_s=5)
    return str(refusal.value)


def joining(credentials: Credentials | None, router: str, node: str, token: str = "") -> tuple[Peers, Membership]:
    """A node that wants to be a member, under that name."""
    peers = Peers(TcpNetwork(credentials=credentials))
    info = NodeInfo(NodeId(node), Generation(1), "store", "127.0.0.1:1")
    return peers, Membership(peers, [router], info, NodeLoad, lambda _: None, heartbeat_s=0.05, token=token)


# --- who is known -----------------------------------------------------------------------------------------


def test_both_ends_prove_who_they_are(run: Callable[[Main], None], authority: Any) -> None:
    async def main() -> None:
        echo = Echo()
        server = TcpNetwork(credentials=authority.credentials("router-0"))
        async with listening(server, echo) as address:
            client = TcpNetwork(credentials=authority.credentials("host-a", nodes=("store-0", "decode-0")))
            connection = await client.connect(address, timeout_s=5)
            assert await connection.call(Ping(), timeout_s=5) == Ok()
            assert echo.names == {"store-0", "decode-0"}, "a host's certificate is of its nodes, not of the host's name"
            assert [r async for r in connection.stream(Subscribe(), idle_timeout_s=5)] == [PrefillProgress(1)]
            await connection.close()
            alone = await TcpNetwork(credentials=authority.credentials("store-1")).connect(address, timeout_s=5)
            await alone.call(Ping(), timeout_s=5)
            assert echo.names == {"store-1"}
            await alone.close()

    run(main)


def test_a_plain_connection_proves_nothing() -> None:
    async def main() -> None:
        echo = Echo()
        async with listening(TcpNetwork(), echo) as address:
            connection = await TcpNetwork().connect(address, timeout_s=5)
            await connection.call(Ping(), timeout_s=5)
            assert echo.names is None
            await connection.close()

    asyncio.run(main())


def test_who_is_refused_is_told_why_and_so_is_the_log(
    run: Callable[[Main], None], authority: Any, stranger: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong CA at either end, an expired certificate, none, no TLS at all."""
    foreign = stranger.credentials("store-0")
    half = authority.secrets("half")  # trusts us, and shows what we do not trust
    lay(half, stranger.issue("store-0"))
    lay_ca(half, authority.issue("x").ca)
    expired = authority.credentials("late", days=1, ago_s=10 * DAY_S)
    nobody = authority.credentials("nobody")
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(authority.secrets("nobody") / "ca.pem")
    nobody.now = nobody.now._replace(client=bare)

    async def main() -> None:
        caplog.clear()
        async with listening(TcpNetwork(credentials=authority.credentials("router-0")), Echo()) as address:
            for credentials, ours, theirs in (
                (foreign, "its certificate is refused: of an unknown CA", "it does not trust the CA"),
                (Credentials(half), "it does not trust the CA of this node's certificate", "of an unknown CA"),
                (expired, "this node's certificate has expired", "its certificate is refused: expired"),
                (nobody, "it wants a certificate, and this node has none", "it shows no certificate"),
            ):
                with pytest.raises(Untrusted, match=ours):
                    await TcpNetwork(credentials=credentials).connect(address, timeout_s=5)
                for _ in range(100):
                    if theirs in str([vars(record) for record in caplog.records]):
                        break
                    await asyncio.sleep(0.02)
                else:
                    pytest.fail(f"the server does not say: {theirs}")
            assert "TLS" in await refused(TcpNetwork(), address)
            good = await TcpNetwork(credentials=authority.credentials("store-0")).connect(address, timeout_s=5)
            assert await good.call(Ping(), timeout_s=5) == Ok()
            await good.close()
        async with listening(TcpNetwork(), Echo()) as address:
            assert "it speaks no TLS" in await refused(TcpNetwork(credentials=nobody), address)

    with caplog.at_level(logging.WARNING):
        run(main)


def test_a_server_at_another_address_than_its_certificate_says_is_refused(authority: Any) -> None:
    issued = issue(authority.folder, "router-0", ["10.1.2.3", "router.example"], now_s=clock.wall_s())
    lay(authority.secrets("router-0"), issued)

    async def main() -> None:
        server = TcpNetwork(credentials=Credentials(authority.secrets("router-0")))
        async with listening(server, Echo()) as address:
            why = await refused(TcpNetwork(credentials=authority.credentials("store-0")), address)
            assert "not valid for '127.0.0.1'" in why

    asyncio.run(main())


def test_one_who_says_nothing_is_cut_off_and_holds_up_nobody(
    run: Callable[[Main], None], authority: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracehaul.rpc.tls.HANDSHAKE_S", 0.3)

    async def main() -> None:
        network = TcpNetwork(Limits(connections_max=20), credentials=authority.credentials("router-0"))
        async with listening(network, Echo()) as address:
            host, _, port = address.rpartition(":")
            silent = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
            with pytest.raises(PeerLost):  # so many at once are too many
                await network.connect(address, timeout_s=5)
            for _ in range(100):
                with contextlib.suppress(PeerLost):
                    connection = await network.connect(address, timeout_s=5)
                    break
                await asyncio.sleep(0.05)
            else:
                pytest.fail("those who say nothing are in the way of others")
            assert await connection.call(Ping(), timeout_s=5) == Ok()
            for reader, writer in silent:
                with contextlib.suppress(ConnectionError):
                    await asyncio.wait_for(reader.read(), 5)
                writer.close()
            await connection.close()

    run(main)


# --- members ----------------------------------------------------------------------------------------------


def test_a_name_belongs_to_its_certificate(authority: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Another node's good certificate does not do, neither for joining nor for heartbeats."""
    store = authority.credentials("store-0")

    async def main() -> None:
        guarded = Gate(MemberRegistry(lambda _: None))
        async with listening(TcpNetwork(credentials=authority.credentials("router-0")), guarded) as address:
            peers, member = joining(store, address, "store-0")
            task = asyncio.create_task(member.run())
            await asyncio.wait_for(member.joined.wait(), 5)
            thief, imposture = joining(authority.credentials("store-1"), address, "store-0")
            with pytest.raises(Untrusted, match=r"the router refuses store-0: its certificate is of store-1"):
                await asyncio.wait_for(imposture.run(), 5)
            with pytest.raises(Untrusted, match="store-0"):
                await thief.call(address, Heartbeat(NodeId("store-0"), Generation(1), NodeLoad()), timeout_s=5)
            # Its own Join, heard and said again, is of its name too.
            with pytest.raises(Untrusted, match="store-0"):
                await anext(aiter(thief.stream(address, Join(member._info), idle_timeout_s=5)))
            assert member.joined.is_set()
            task.cancel()
            await thief.close()
            await peers.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert [record.msg for record in caplog.records].count("refused a node") == 1, "said once, not at each attempt"


@pytest.mark.parametrize("tokens", [("right",), ("right", "old")])
def test_a_join_token(tokens: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with listening(TcpNetwork(), Gate(MemberRegistry(lambda _: None), tokens)) as address:
            for token in tokens:
                peers, member = joining(None, address, "store-0", token)
                task = asyncio.create_task(member.run())
                await asyncio.wait_for(member.joined.wait(), 5)
                task.cancel()
                await peers.close()
            for token, why in (("", "it has no join token"), ("wrong", "its join token is wrong"), ("ß", "is wrong")):
                peers, member = joining(None, address, "store-0", token)
                with pytest.raises(Untrusted, match=why):
                    await asyncio.wait_for(member.run(), 5)
                await peers.close()

    with caplog.at_level(logging.DEBUG):
        asyncio.run(main())
    said = str([vars(record) for record in caplog.records])
    assert "refused a node" in said
    assert "'right'" not in said
    assert "'wrong'" not in said


def test_a_stranger_without_a_token_gets_nothing_of_a_router(caplog: pytest.LogCaptureFixture) -> None:
    """Where the control plane is plain: it is answered that the router is there, and speaks for no member whose
    generation it does not know."""

    async def main() -> None:
        registry = MemberRegistry(lambda _: None)
        async with listening(TcpNetwork(), Gate(registry, ("right",))) as address:
            peers, member = joining(None, address, "store-0", "right")
            task = asyncio.create_task(member.run())
            await asyncio.wait_for(member.joined.wait(), 5)
            stranger = Peers(TcpNetwork())
            assert await stranger.call(address, Ping(), timeout_s=5) == Ok()
            beats = [Heartbeat(NodeId(n), Generation(g), NodeLoad()) for n, g in (("store-1", 1), ("store-0", 2))]
            for request in (Attach(), Describe(), Drain(), *beats):
                with pytest.raises(ClusterError):
                    await stranger.call(address, request, timeout_s=5)
            for asked in (Subscribe(), Join(member._info), Join(member._info, token=NOT_IT)):
                with pytest.raises(ClusterError):
                    await anext(aiter(stranger.stream(address, asked, idle_timeout_s=5)))
            assert member.joined.is_set()
            task.cancel()
            await stranger.close()
            await peers.close()

    asyncio.run(main())


def test_a_member_whose_certificate_is_replaced_late_waits_and_says_so(
    authority: Any, stranger: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has been trusted once: it does not end, and is a member again when it has what it needs."""
    monkeypatch.setattr("tracehaul.rpc.membership.BACKOFF_MAX_S", 0.1)
    mine = authority.credentials("store-0")

    async def main() -> None:
        router = authority.credentials("router-0")
        registry = MemberRegistry(lambda _: None)
        server = await TcpNetwork(credentials=router).listen(LISTEN, Gate(registry))
        peers, member = joining(mine, server.address, "store-0")
        task = asyncio.create_task(member.run())
        await asyncio.wait_for(member.joined.wait(), 5)
        await server.close()
        lay_ca(authority.secrets("router-0"), stranger.issue("x").ca)
        router.refresh()
        server = await TcpNetwork(credentials=router).listen(server.address, Gate(registry))
        for _ in range(100):
            if "a router refuses this node" in [record.msg for record in caplog.records]:
                break
            await asyncio.sleep(0.05)
        else:
            pytest.fail("it does not say why it is no member")
        assert not task.done()
        lay_ca(authority.secrets("router-0"), authority.issue("x").ca)
        router.refresh()
        await asyncio.wait_for(member.joined.wait(), 10)
        task.cancel()
        await peers.close()
        await server.close()

    with caplog.at_level(logging.INFO):
        asyncio.run(main())


# --- changing the CA --------------------------------------------------------------------------------------


class Steady(Echo):
    """Also has a stream that does not end."""

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        for number in range(1_000_000):
            yield PrefillProgress(number)
            await asyncio.sleep(0.005)


def test_a_ca_is_replaced_and_no_call_and_no_stream_is_lost(run: Callable[[Main], None], authority: Any) -> None:
    nodes = ["a", "b", "c"]
    everyone = {name: authority.credentials(name) for name in nodes}
    taken = authority.credentials("taken")  # keeps what it was given first

    def all_refresh() -> None:
        for credentials in everyone.values():
            credentials.refresh()

    async def main() -> None:
        networks = {name: TcpNetwork(credentials=credentials) for name, credentials in everyone.items()}
        async with listening(networks["a"], Steady()) as address:
            peers = {name: Peers(networks[name]) for name in nodes}
            stream = peers["b"].stream(address, Subscribe(), idle_timeout_s=5)
            assert isinstance(await anext(aiter(stream)), PrefillProgress)
            calls = 0

            async def call() -> None:
                """Over a connection that stays, and over a new one."""
                nonlocal calls
                await peers["c"].call(address, Ping(), timeout_s=5)
                for name in nodes:
                    connection = await networks[name].connect(address, timeout_s=5)
                    assert await connection.call(Ping(), timeout_s=5) == Ok()
                    await connection.close()
                    calls += 1

            await call()
            both = rotate(authority.folder, now_s=clock.wall_s())
            for name in nodes:  # who has been told of it and who has not still trust each other
                lay_ca(authority.secrets(name), both)
                all_refresh()
                await call()
            for name in nodes:
                lay(authority.secrets(name), authority.issue(name))
                all_refresh()
                await call()
            new = retire(authority.folder)
            for name in nodes:
                lay_ca(authority.secrets(name), new)
                all_refresh()
                await call()
            with pytest.raises(Untrusted, match="unknown CA"):  # it does not know ours, we do not know its
                await TcpNetwork(credentials=taken).connect(address, timeout_s=5)
            lay_ca(authority.secrets("taken"), new)
            taken.refresh()
            with pytest.raises(Untrusted, match="it does not trust the CA of this node's certificate"):
                await TcpNetwork(credentials=taken).connect(address, timeout_s=5)
            before = await anext(aiter(stream))
            after = await anext(aiter(stream))
            assert isinstance(before, PrefillProgress)
            assert isinstance(after, PrefillProgress)
            assert calls == 3 * (1 + 3 + 3 + 3)
            await stream.aclose()
            for one in peers.values():
                await one.close()

    run(main)


def test_files_that_make_no_sense_change_nothing(authority: Any) -> None:
    mine = authority.credentials("a")
    before = mine.now
    other = authority.issue("a")
    (authority.secrets("a") / "node.pem").write_bytes(other.cert)  # whose key is not there yet
    mine.refresh()
    assert mine.now is before
    (authority.secrets("a") / "node.key").write_bytes(other.key)
    mine.refresh()
    assert mine.now.version == before.version + 1
    (authority.secrets("a") / "ca.pem").write_bytes(b"nonsense")
    mine.refresh()
    assert mine.now.version == before.version + 1


def test_members_know_nothing_of_tokens(authority: Any) -> None:
    """What members are told has no secret in it."""

    async def main() -> None:
        async with listening(TcpNetwork(), Gate(MemberRegistry(lambda _: None), ("right",))) as address:
            peers, member = joining(None, address, "store-0", "right")
            task = asyncio.create_task(member.run())
            await asyncio.wait_for(member.joined.wait(), 5)
            assert isinstance(member.members, Members)
            assert "right" not in repr(member.members)
            task.cancel()
            await peers.close()

    asyncio.run(main())


def test_an_untrusted_peer_is_a_lost_one_to_those_who_do_not_ask_why() -> None:
    assert issubclass(Untrusted, PeerLost)
