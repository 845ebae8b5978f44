"""The client of the router's bench: what it counts does not depend on how the bytes come."""

import socket
from collections.abc import Generator
from contextlib import contextmanager
from threading import Thread

import pytest

from bench.router.client import Client

STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b"10\r\ndata:  people .\n\r\n12\r\ndata:  people peop\r\n3\r\nle.\r\n0\r\n\r\n"
)
REFUSAL = b'HTTP/1.1 400 Bad Request\r\nContent-Length: 14\r\n\r\n{"error":"no"}'


@contextmanager
def server(answer: bytes, calls: int = 1) -> Generator[int, None, None]:
    """Answers so many calls on one connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                for _ in range(calls):
                    request = b""
                    while not request.endswith(b"\r\n\r\n"):
                        request += connection.recv(1 << 16)
                    connection.sendall(answer)

        thread = Thread(target=run)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_words_and_ends_are_seen_across_reads(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.router.client.READ_BYTES", size)
    with server(STREAM, calls=2) as port:
        client = Client(port, b" people")
        for _ in range(2):
            answer = client.ask(b"GET / HTTP/1.1\r\n\r\n")
            assert (answer.status, len(answer.told_s)) == (200, 2)
            assert answer.sent_s <= answer.told_s[0] <= answer.told_s[1] <= answer.ended_s
        client.close()


@pytest.mark.parametrize("size", [1, 1000])
def test_a_refusal_is_read_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.router.client.READ_BYTES", size)
    with server(REFUSAL) as port:
        client = Client(port, b" people")
        answer = client.ask(b"GET / HTTP/1.1\r\n\r\n")
        assert (answer.status, answer.body, len(answer.told_s)) == (400, b'{"error":"no"}', 0)
        client.close()


def test_an_answer_that_breaks_off_is_an_error() -> None:
    with server(STREAM[:-5]) as port, pytest.raises(RuntimeError, match="mid-answer"):
        Client(port, b" people").ask(b"GET / HTTP/1.1\r\n\r\n")
