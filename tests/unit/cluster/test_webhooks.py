"""Events over real sockets: who may be told, with which signature, and receivers that are dead, slow, huge or lie."""

import asyncio
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import openai
import pytest
from standardwebhooks import Webhook, WebhookVerificationError
from typer.testing import CliRunner

from cluster.config import ClusterConfig
from cluster.config_file import load_config
from cluster.rundir import ClusterFault
from cluster.webhooks import sender as rooms
from cluster.webhooks.commands import app
from cluster.webhooks.config import WebhookConfig
from cluster.webhooks.secrets import NoSecret, ensure, fresh, read, rotate
from cluster.webhooks.sender import HttpSender, permitted
from jobs.webhooks.deliveries import Delivered, Failed, Outcome
from jobs.webhooks.events import KINDS, Event
from tracehaul.runtime.clock import wall_s

EVENT = Event("batch.completed", "", "batch_1", 1_700_000_000)
LOOPBACK = ("127.0.0.0/8",)
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Receiver:
    """A server of raw bytes; keeps the last request's headers and body."""

    def __init__(self, answer: bytes | Answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n") -> None:
        self._answer = answer
        self.requests: list[tuple[str, dict[str, str], bytes]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        headers = {name.lower(): value for name, value in headers.items()}
        body = await reader.readexactly(int(headers["content-length"]))
        self.requests.append((head[0], headers, body))
        try:
            if isinstance(self._answer, bytes):
                writer.write(self._answer)
                await writer.drain()
            else:
                await self._answer(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()


def sent(
    folder: Path, receiver: Receiver | None, *, networks: tuple[str, ...] = LOOPBACK, host: str = "127.0.0.1"
) -> Outcome:
    """What comes of telling it; None: nobody listens there."""

    async def main() -> Outcome:
        server = None
        if receiver is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        else:
            server = await asyncio.start_server(receiver, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
        webhook = WebhookConfig(f"http://{host}:{port}/hook?a=b", networks=networks)
        ensure(folder / "secret")
        sender = HttpSender([webhook], folder)
        try:
            async with asyncio.timeout(10):
                return await sender.send(webhook.receiver, EVENT.name, EVENT.body())
        finally:
            sender.close()
            if server is not None:
                server.close()

    return asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_openais_client_takes_what_is_told(tmp_path: Path, kind: str) -> None:
    receiver = Receiver()
    assert sent(tmp_path, receiver) == Delivered()
    [(line, headers, body)] = receiver.requests
    assert line == "POST /hook?a=b HTTP/1.1"
    client = openai.OpenAI(api_key="none", webhook_secret=read(tmp_path / "secret")[0])
    told = client.webhooks.unwrap(body, headers)
    assert (told.type, told.data.id, told.id) == ("batch.completed", "batch_1", EVENT.name)
    client.webhooks.verify_signature(body, headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(body + b" ", headers)
    # Each other kind is one that it knows, too.
    other = msgspec.structs.replace(EVENT, kind=kind).body()
    parsed = openai.types.webhooks.UnwrapWebhookEvent
    assert (
        type(client.webhooks.unwrap(other, _signed(read(tmp_path / "secret")[0], other))) in parsed.__args__[0].__args__
    )


def _signed(secret: str, body: str) -> dict[str, str]:
    at = datetime.fromtimestamp(int(wall_s()), UTC)
    signature = Webhook(secret).sign("e", at, body)
    return {"webhook-id": "e", "webhook-timestamp": str(int(at.timestamp())), "webhook-signature": signature}


def test_two_secrets_are_valid_while_receivers_change(tmp_path: Path) -> None:
    receiver, path = Receiver(), tmp_path / "secret"
    ensure(path)
    [first] = read(path)
    second = rotate(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert sent(tmp_path, receiver) == Delivered()
    third = rotate(path)
    assert sent(tmp_path, receiver) == Delivered()
    assert read(path) == [third, second]
    (_, headers, body), (_, later, _) = receiver.requests
    for secret in (first, second):
        assert Webhook(secret).verify(body, headers)["id"] == EVENT.name
    Webhook(third).verify(body, later)
    Webhook(second).verify(body, later)
    with pytest.raises(WebhookVerificationError):
        Webhook(first).verify(body, later)


@pytest.mark.parametrize("text", ["", "secret", "whsec_", "whsec_!!!", "whsec_" + "QUJD" * 2, "whsec_" + "QUJD" * 30])
def test_what_is_no_secret_signs_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "secret").write_text(text)
    with pytest.raises(NoSecret):
        read(tmp_path / "secret")
    receiver = Receiver()
    assert isinstance(sent(tmp_path, receiver), Failed)
    assert receiver.requests == []


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", Delivered()),
        (b"HTTP/1.1 500 Oh\r\n\r\n", Failed("it answers 500")),
        (b"HTTP/1.1 410 Gone\r\n\r\n", Failed("it answers 410", gone=True)),
        (b"HTTP/1.1 429 Slow\r\nRetry-After: 120\r\n\r\n", Failed("it answers 429", 120.0)),
        (b"HTTP/1.1 503 Off\r\nRetry-After: Wed, 21 Oct\r\n\r\n", Failed("it answers 503")),
        (
            b"HTTP/1.1 302 There\r\nLocation: http://127.0.0.1:1/\r\n\r\n",
            Failed("it answers 302, and is not followed elsewhere"),
        ),
    ],
)
def test_what_an_answer_means(tmp_path: Path, answer: bytes, outcome: Outcome) -> None:
    assert sent(tmp_path, Receiver(answer)) == outcome


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 2000000 OK\r\n\r\n", b"\0" * 1000, b"HTTP/1.1 200 OK\r\nx: "]
)
def test_one_that_lies_has_failed(tmp_path: Path, answer: bytes) -> None:
    assert isinstance(sent(tmp_path, Receiver(answer)), Failed)


def test_one_that_is_dead_has_failed(tmp_path: Path) -> None:
    outcome = sent(tmp_path, None)
    assert isinstance(outcome, Failed)
    assert not outcome.gone


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example"])
def test_one_whose_name_can_be_nobodys_has_failed(tmp_path: Path, host: str) -> None:
    outcome = sent(tmp_path, None, host=host)
    assert isinstance(outcome, Failed)
    assert outcome.why.startswith("its host is no name")


async def _drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def _hints(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 103 Early\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def _silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@pytest.mark.parametrize("answer", [_drip, _hints, _silent])
def test_one_that_is_slow_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
    monkeypatch.setattr(rooms, "SEND_S", 0.3)
    outcome = sent(tmp_path, Receiver(answer))
    assert isinstance(outcome, Failed)
    assert outcome.why.startswith("no answer within")


def test_of_a_huge_answer_nothing_is_read(tmp_path: Path) -> None:
    written = 0

    async def huge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000000\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
            written += 65536

    assert sent(tmp_path, Receiver(huge)) == Delivered()
    assert written < 64 << 20


# --- where events may go --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "192.168.0.1",
            "172.16.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1"),
        *(
            "::ffff:10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2001:0:1::1",
            "::7f00:1",
            "2001:db8::1",
        ),
    ],
)
def test_only_public_addresses_unless_a_network_is_named(address: str) -> None:
    told = ipaddress.ip_address(address)
    assert not permitted(told, (), plain=False)
    assert not permitted(told, (), plain=True)
    if getattr(told, "ipv4_mapped", None) is None:
        assert permitted(told, [ipaddress.ip_network(told)], plain=True)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1"])
def test_public_addresses_are_told_under_tls_alone(address: str) -> None:
    told = ipaddress.ip_address(address)
    assert permitted(told, (), plain=False)
    assert not permitted(told, [ipaddress.ip_network("10.0.0.0/8")], plain=True)


def test_a_name_that_leads_elsewhere_is_not_connected_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = Receiver()
    outcome = sent(tmp_path, receiver, networks=("10.0.0.0/8",), host="localhost")
    assert isinstance(outcome, Failed)
    assert "localhost is 127.0.0.1" in outcome.why or "localhost is ::1" in outcome.why
    assert "networks" in outcome.why
    assert sent(tmp_path, receiver, host="localhost") == Delivered()
    assert len(receiver.requests) == 1

    # What a name said when it was looked at counts, and what it says a moment later does not.
    looked: list[str] = []
    real = socket.getaddrinfo

    def lies(host: object, *rest: object, **more: object) -> object:
        if host != "rebound.example":
            return real(host, *rest, **more)  # pyright: ignore
        looked.append("asked")
        return real("127.0.0.1" if len(looked) == 1 else "127.9.9.9", *rest, **more)  # pyright: ignore

    monkeypatch.setattr(socket, "getaddrinfo", lies)
    assert sent(tmp_path, receiver, networks=("127.0.0.1/32",), host="rebound.example") == Delivered()
    assert looked == ["asked"]
    assert receiver.requests[-1][1]["host"].startswith("rebound.example:")
    assert isinstance(sent(tmp_path, receiver, networks=("127.0.0.1/32",), host="rebound.example"), Failed)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"url": "ftp://a.example/"}, "no URL"),
        ({"url": "https:///x"}, "no URL"),
        ({"url": "https://a.example:99999/"}, "no URL"),
        ({"url": "https://me:secret@a.example/"}, "leave user"),
        ({"url": "http://a.example/"}, "plain http"),
        ({"url": "https://a.example/", "networks": ["10.0.0.1/8"]}, "write networks like"),
        ({"url": "https://a.example/", "events": ["batch.done"]}, "Invalid enum value"),
        ({"url": "https://a.example/", "secret": "../x"}, "Expected `str` matching"),
    ],
)
def test_a_config_that_is_wrong_is_refused(fields: dict[str, object], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert({"webhooks": [fields]}, ClusterConfig)


def test_two_of_one_url_are_refused_with_the_line(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[[webhooks]]\nurl = "https://a.example/"\n[[webhooks]]\nurl = "https://a.example/"\n')
    with pytest.raises(ClusterFault, match="two webhooks have one url"):
        load_config(config, {})


def test_the_command_makes_a_secret_and_keeps_the_one_of_before(tmp_path: Path) -> None:
    told = [CliRunner().invoke(app, ["rotate", "--run-dir", str(tmp_path)]).stdout.strip() for _ in range(3)]
    assert read(tmp_path / "webhooks" / "secret") == [told[2], told[1]]
    assert all(len(secret) == len(fresh()) for secret in told)
    assert json.loads(EVENT.body())["object"] == "event"
