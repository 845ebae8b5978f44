"""Secrets that events are signed with: a file of one line, or of two while receivers change to the new one."""

import base64
import binascii
import os
from datetime import UTC, datetime
from pathlib import Path

from standardwebhooks import Webhook

from tracehaul.runtime.durable import write_whole

PREFIX = "whsec_"
BYTES = 32
BYTES_MIN, BYTES_MAX = 24, 64
"""The scheme's."""
VALID = 2
"""So many lines count, the newest first."""


class NoSecret(Exception):
    """There is none that could be used; says why."""


def fresh() -> str:
    """A new one."""
    return PREFIX + base64.b64encode(os.urandom(BYTES)).decode()


def read(path: Path) -> list[str]:
    """The newest first.

    Raises:
        NoSecret: there is none.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise NoSecret(f"{path} cannot be read: {error}") from None
    found = [line for line in lines if line and not line.startswith("#")][:VALID]
    for line in found:
        try:
            key = base64.b64decode(line.removeprefix(PREFIX), validate=True)
        except binascii.Error:
            key = b""
        if not line.startswith(PREFIX) or not BYTES_MIN <= len(key) <= BYTES_MAX:
            raise NoSecret(
                f"{path} has a line that is no secret: {PREFIX} and {BYTES_MIN} to {BYTES_MAX} bytes in base64"
            )
    if not found:
        raise NoSecret(f"{path} is empty")
    return found


def ensure(path: Path) -> None:
    """There is one. Raises OSError."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(path, f"{fresh()}\n".encode(), private=True)


def rotate(path: Path) -> str:
    """A new one before the one of before, which stays valid; returns the new one. Raises OSError, NoSecret."""
    before = read(path)[:1] if path.exists() else []
    made = fresh()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(path, "".join(f"{line}\n" for line in (made, *before)).encode(), private=True)
    return made


def signatures(secrets: list[str], event: str, at_s: float, body: str) -> str:
    """The header's value: one signature by each."""
    at = datetime.fromtimestamp(at_s, UTC)
    return " ".join(Webhook(secret).sign(event, at, body) for secret in secrets)
