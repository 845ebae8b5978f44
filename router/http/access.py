"""Who asks, and what they may: the gate before every page and every call."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import Scope

from router.calls.call import Call
from router.calls.errors import CallFailed
from router.http.asgi import Headers
from router.http.keys import BadKeys, Key, Keyring, read_keys
from router.http.limiter import Limiter, Quota, Standing
from tracehaul.runtime import clock
from tracehaul.runtime.files import Watched
from tracehaul.runtime.log import Log

log = Log(__name__)

CALLER = "tracehaul.caller"
"""Where a request's scope says who it is of."""
PUBLIC = frozenset({"/health", "/version", "/openapi.json"})
"""Pages that need no key."""


class Space(msgspec.Struct, frozen=True):
    """Where a request's traces and blocks are."""

    salt: str
    """Keeps them apart from all others."""
    tenant: str
    """Whose quota they count to."""


class Caller(msgspec.Struct, frozen=True):
    """Who sent a request."""

    key: Key | None = None
    """None: nobody is asked for one, and everybody may do everything."""

    @property
    def steers(self) -> bool:
        """Whether it may."""
        return self.key is None or self.key.steer

    def serves(self, model: str) -> bool:
        """Whether it may ask for that model."""
        return self.key is None or self.key.models is None or model in self.key.models

    def space(self, salt: str) -> Space:
        """Where what it says ``cache_salt`` of is. A key's tenant is its own whatever it says: what it adds makes a
        part of that.

        Raises:
            CallFailed: it may not say it.
        """
        key = self.key
        if key is None:
            return Space(salt, salt)
        if salt in ("", key.tenant):
            return Space(key.tenant, key.tenant)
        self.steer("cache_salt", "cache_salt")
        return Space(f"{key.tenant}/{salt}", key.tenant) if key.tenant else Space(salt, salt)

    def steer(self, what: str, param: str | None = None) -> None:
        """It wants to.

        Raises:
            CallFailed: it may not.
        """
        if not self.steers:
            message = f"this API key may not steer the cluster: {what} is for keys that may"
            raise CallFailed("forbidden", message, param=param, code="steering_not_allowed")

    def use(self, model: str) -> None:
        """It asks for that model.

        Raises:
            CallFailed: it may not.
        """
        if not self.serves(model):
            message = f"this API key may not use the model {model[:128]!r}"
            raise CallFailed("forbidden", message, param="model", code="model_not_allowed")

    def placed(self, call: Call) -> Call:
        """A call of its own: in its space, and of a model that it may ask for.

        Raises:
            CallFailed: it may not.
        """
        if self.key is None:
            return call
        self.use(call.model)
        space = self.space(call.tenant)
        return msgspec.structs.replace(call, tenant=space.salt, quota=space.tenant)


ANYBODY = Caller()


class Gate:
    """Lets requests in, by their keys."""

    def __init__(self, keyring: Keyring | None = None) -> None:
        """``keyring``: None: nobody is asked for a key."""
        self._keyring = keyring
        self._limiter = Limiter()

    def enter(self, headers: Mapping[str, str]) -> Caller:
        """Who sends a request with these headers, by lower-case name.

        Raises:
            CallFailed: it has no valid key.
        """
        if self._keyring is None:
            return ANYBODY
        sent = _sent(headers)
        if not sent:
            message = "an API key is needed: send it as Authorization: Bearer KEY, or as x-api-key"
            raise CallFailed("unauthorized", message, code="invalid_api_key")
        key = self._keyring.find(sent)
        if key is None:
            raise CallFailed("unauthorized", "the API key is not valid", code="invalid_api_key")
        return Caller(key)

    def began(self, caller: Caller) -> None:
        """A call of it begins; :meth:`ended` follows.

        Raises:
            CallFailed: it must wait.
        """
        if caller.key is None:
            return
        refused = self._limiter.begin(caller.key.id, caller.key.quota, clock.now_s())
        if refused is not None:
            raise CallFailed(
                "limited",
                f"the limit of this API key is reached: {refused.what}",
                code="rate_limit_exceeded",
                retry_after_s=refused.retry_after_s,
            )

    def went_on(self, caller: Caller) -> None:
        """What a call of it began runs after its answer; :meth:`ended` follows."""
        if caller.key is not None:
            self._limiter.go_on(caller.key.id, clock.now_s())

    def spent(self, caller: Caller, tokens: int) -> None:
        """Its call used these."""
        if caller.key is not None:
            self._limiter.spend(caller.key.id, caller.key.quota, tokens, clock.now_s())

    def ended(self, caller: Caller) -> None:
        """Its call is over."""
        if caller.key is None or self._keyring is None:
            return
        self._limiter.end(caller.key.id)
        if caller.key.id not in self._keyring.ids:
            self._limiter.keep(self._keyring.ids)

    def standing(self, caller: Caller) -> Headers:
        """What is left of its limits, in OpenAI's headers."""
        if caller.key is None or caller.key.quota == Quota():
            return []
        left = self._limiter.standings(caller.key.id, caller.key.quota, clock.now_s())
        return [*_told("requests", left.requests), *_told("tokens", left.tokens)]


class KeysOnDisk:
    """A file of keys, and those of it that are valid now."""

    def __init__(self, path: Path, more: Key | None = None) -> None:
        """``more``: a key beside those of the file.

        Raises:
            OSError, BadKeys: it cannot be read.
        """
        self._path = path
        self._more = () if more is None else (more,)
        self._watched = Watched(path)
        self._watched.changed()
        self.keyring = Keyring(self._read())

    def refresh(self) -> None:
        """Take the file's new content, if it has changed and makes sense."""
        if not self._watched.changed():
            return
        try:
            keys = self._read()
        except (OSError, BadKeys) as error:
            log.warning("the keys cannot be read: those of before stay valid", file=self._path, why=error)
            return
        self.keyring.replace(keys)
        log.info("the keys were read again", file=self._path, keys=len(keys))

    def _read(self) -> tuple[Key, ...]:
        return (*read_keys(self._path.read_bytes()).keys, *self._more)


def caller_of(scope: Scope) -> Caller:
    """Who sent the request of that scope, which has passed the gate."""
    found: Any = scope.get(CALLER, ANYBODY)
    assert isinstance(found, Caller)
    return found


def _sent(headers: Mapping[str, str]) -> str:
    kind, _, sent = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and sent.strip():
        return sent.strip()
    return headers.get("x-api-key", "").strip()


def _told(kind: str, standing: Standing | None) -> Headers:
    if standing is None:
        return []
    values = (
        ("limit", str(standing.limit)),
        ("remaining", str(standing.remaining)),
        ("reset", _span(standing.reset_s)),
    )
    return [(f"x-ratelimit-{name}-{kind}".encode(), value.encode()) for name, value in values]


def _span(seconds: float) -> str:
    """As OpenAI writes it: ``6m0s``, ``1.5s``, ``20ms``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 1000) / 1000, 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"
