"""A server that takes webhooks' events, refuses them, or is dead."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal


class Receiver:
    """On this host, until it is closed."""

    def __init__(self) -> None:
        self.does: Literal["take", "refuse", "nothing"] = "take"
        """With what it is told; who tells it while it does nothing waits until that one's own end."""
        self.told: list[tuple[bytes, dict[str, str]]] = []
        """What it took: bodies and headers."""
        self.refused: list[bytes] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body, does = self.rfile.read(int(self.headers["content-length"])), receiver.does
                if does == "nothing":
                    self.rfile.read(1)
                    return
                if does == "take":
                    receiver.told.append((body, dict(self.headers)))
                else:
                    receiver.refused.append(body)
                self.send_response(204 if does == "take" else 500)
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def taken(self) -> list[str]:
        """Names of what has ended."""
        return [_about(body) for body, _ in self.told]

    @property
    def tried(self) -> list[str]:
        """The same of what it refused."""
        return [_about(body) for body in self.refused]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _about(body: bytes) -> str:
    return json.loads(body)["data"]["id"]
