"""API keys as they are kept: what each may do, and of its secret a hash. Pure.

A key reads ``th-ID-SECRET``. The secret is 256 random bits, so that nobody can try them all and a plain fast hash keeps
it as well as a slow one would; it is compared in constant time. The id is no secret: it names the key in the file, in
logs and to whom revokes it.
"""

import hashlib
import hmac
import re
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from router.http.limiter import Quota

PREFIX = "th-"
ID_BYTES = 4
SECRET_BYTES = 32
_SENT = re.compile(rf"{PREFIX}([0-9a-f]{{{2 * ID_BYTES}}})-([A-Za-z0-9_-]{{43}})", re.ASCII)

Most = Annotated[int, Meta(ge=1)]
Tenant = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{0,64}$")]
"""Without ``/``, which stands between a tenant and what parts it has."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key."""

    id: Annotated[str, Meta(pattern=f"^[0-9a-f]{{{2 * ID_BYTES}}}$")]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    """Of the whole key as clients send it."""
    tenant: Tenant = ""
    """Whose traces and blocks its calls use; empty: of nobody in particular."""
    models: tuple[str, ...] | None = None
    """Those that may be asked for; None: all."""
    requests_per_minute: Most | None = None
    tokens_per_minute: Most | None = None
    concurrency: Most | None = None
    """Calls at once."""
    steer: bool = False
    """It may look at the cluster (``/cluster``, ``/metrics``), pin, choose workers, and say ``cache_salt``."""
    created: int = 0
    """Seconds since 1970."""
    note: str = ""

    @property
    def quota(self) -> Quota:
        """What it may use."""
        return Quota(self.requests_per_minute, self.tokens_per_minute, self.concurrency)


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    keys: tuple[Key, ...] = ()


class BadKeys(Exception):
    """The file is none of keys; says why in one line."""


def read_keys(data: bytes) -> KeyFile:
    """The file's content.

    Raises:
        BadKeys: it is something else, or two keys have one id.
    """
    try:
        file = msgspec.json.decode(data, type=KeyFile)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise BadKeys(str(error)) from None
    ids = [key.id for key in file.keys]
    if len(set(ids)) < len(ids):
        raise BadKeys("two keys have one id")
    return file


def write_keys(file: KeyFile) -> bytes:
    """As :func:`read_keys` reads it, and a person too."""
    return msgspec.json.format(msgspec.json.encode(file)) + b"\n"


def hashed(sent: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(sent.encode()).hexdigest()


def name_of(sent: str) -> str | None:
    """The id in a key as it is sent; None: it is no key."""
    found = _SENT.fullmatch(sent)
    return found.group(1) if found else None


class Keyring:
    """The keys that are valid now."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys: dict[str, Key] = {}
        self.replace(keys)

    def replace(self, keys: Sequence[Key]) -> None:
        """These are valid from now on, and no others."""
        self._keys = {key.id: key for key in keys}

    @property
    def ids(self) -> frozenset[str]:
        """Of all of them."""
        return frozenset(self._keys)

    def of(self, name: str) -> Key | None:
        """The key of that id; None: it is not valid."""
        return self._keys.get(name)

    def find(self, sent: str) -> Key | None:
        """The key that this is; None: it is not valid."""
        name = name_of(sent)
        key = self._keys.get(name) if name is not None else None
        if key is None or not hmac.compare_digest(hashed(sent), key.sha256):
            return None
        return key
