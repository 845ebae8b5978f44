"""Objects in a bucket of S3, or of anything that speaks its protocol: the only file that knows obstore.

Endpoint, region and credentials are what the environment says, in the names that every tool of S3 reads:
``AWS_ENDPOINT_URL``, ``AWS_REGION``, ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, or the
machine's role.

Bodies are sent from the arena as they lie there, and not hashed again for the request's signature: a block has its
checksum. A put whose time is over ends when the library has let go of the memory.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine, Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

try:
    import obstore
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
    from obstore.store import S3Store
except ImportError as error:
    raise ImportError("blocks in a bucket need obstore: pip install tracehaul-store[s3]") from error

from kvstore.tiers.object_tier import ObjectTier
from kvstore.tiers.objects import DELETE_MAX, ListedObject, ObjectMissing, ObjectsRefused, ObjectsUnreachable, parse_url
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.wire.errors import Unavailable

log = Log(__name__)

T = TypeVar("T")

CONNECT_TIMEOUT_S = 2.0
GET_TIMEOUT_S = 5.0
"""One body, retries included. Longer than a lease waits: what comes later can be leased then."""
PUT_TIMEOUT_S = 10.0
"""Shorter than a node may take to end: it waits for what is under way."""
CONTROL_TIMEOUT_S = 10.0
"""A page of a listing, a batch of deletes, a probe."""
RETRIES_MAX = 2
RETRY_PAUSE_S = 0.05
LET_GO_POLL_S = 0.002
LET_GO_S = 2.0
"""After it, memory that the library still holds is only complained of: the block's checksum is what protects it."""
PAGE_OBJECTS = 1000
LAST_NAME = "~"
"""Sorts after every name of ours."""
COPY_THREADS = 2
PART_BYTES = 8 << 20
"""Of a body whose length is not known: two parts are sent at a time."""
PARTS_AT_ONCE = 2
PART_TIMEOUT_S = 30.0
"""Of bodies that are files, each request."""
SERVED_COPY_TIMEOUT_S = 120.0
"""A copy that the service makes by itself."""
REASON_CHARS_MAX = 500
BUSY_STATUSES = ("408", "429")
"""Of those that blame the caller, the ones that pass."""
_SAID = re.compile(r"<Code>(.*?)</Code>\s*<Message>(.*?)</Message>")
_STATUS = re.compile(r"status code: (\d{3})")


class NoBucket(Unavailable):
    """The bucket cannot be used: another one, other credentials, or somebody who creates it."""

    code = "no_bucket"
    retriable = False


class S3Objects:
    """The :class:`kvstore.tiers.objects.Objects` in a bucket, under a prefix that nobody else may use.

    Raises:
        NoBucket: the bucket's name or the environment's settings make no sense.
    """

    def __init__(self, bucket: str, prefix: str, put_timeout_s: float | None = None) -> None:
        self._put_timeout_s = put_timeout_s or PUT_TIMEOUT_S
        try:
            self._store = S3Store(
                bucket,
                prefix=prefix or None,
                unsigned_payload=True,
                # A role's credentials come over plain http, and so does a server in the same machine.
                client_options={
                    "allow_http": True,
                    "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
                    "timeout": timedelta(seconds=self._put_timeout_s),
                },
                retry_config={
                    "max_retries": RETRIES_MAX,
                    "retry_timeout": timedelta(seconds=GET_TIMEOUT_S),
                    "backoff": {"init_backoff": timedelta(seconds=RETRY_PAUSE_S)},
                },
            )
        except (BaseError, ValueError) as error:
            raise NoBucket(f"cannot use the bucket {bucket}: {_reason(error)}") from error

    async def put(self, name: str, view: memoryview) -> None:
        body = view[:]  # its own, so that it tells when the library has let go of it
        try:
            await _ask(obstore.put_async(self._store, name, body, use_multipart=False), self._put_timeout_s)
        except ObjectMissing as error:
            raise ObjectsRefused(str(error)) from error
        finally:
            await _let_go(body)

    async def get(self, name: str, size_bytes: int) -> memoryview | None:
        async def read() -> memoryview | None:
            found = await obstore.get_async(self._store, name)
            if found.meta["size"] != size_bytes:
                return None  # not read: it may be anything
            return memoryview(await found.buffer_async())

        body = await _ask(read(), GET_TIMEOUT_S)
        return body if body is None or body.nbytes == size_bytes else None

    async def upload(self, name: str, chunks: AsyncIterator[bytes]) -> None:
        """Make the object of these, in parts, as a whole or not at all: what ``chunks`` raises ends it, and leaves
        nothing. Who has it cancelled leaves parts that no listing shows. Ends soon after ``chunks`` does."""
        with _translated():
            await obstore.put_async(
                self._store,
                name,
                chunks,
                use_multipart=True,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )

    async def read(self, name: str, start: int, nbytes: int) -> bytes:
        """So many bytes from there on; fewer where the object ends.

        Raises:
            ObjectMissing: there is no such object.
        """
        call = obstore.get_range_async(self._store, name, start=start, length=nbytes)
        try:
            return bytes(memoryview(await _ask(call, self._put_timeout_s)))
        except ObjectsRefused as error:
            status = _STATUS.search(str(error))
            if status is not None and status[1] == "416":
                return b""
            raise

    async def copy(self, source: str, target: str) -> None:
        """Make an object of the bytes of another.

        Raises:
            ObjectMissing: there is no such object.
        """
        await _ask(obstore.copy_async(self._store, source, target), SERVED_COPY_TIMEOUT_S)

    async def delete(self, names: Sequence[str]) -> None:
        assert 0 < len(names) <= DELETE_MAX
        with suppress(ObjectMissing):  # some services say so
            await _ask(obstore.delete_async(self._store, list(names)), CONTROL_TIMEOUT_S)

    async def pages(self, under: str | None = None) -> AsyncIterator[Sequence[ListedObject]]:
        """As :class:`kvstore.tiers.objects.Objects`; ``under``: those below this name alone."""
        stream = obstore.list(self._store, prefix=under, chunk_size=PAGE_OBJECTS)
        while (page := await _ask(anext(stream, None), CONTROL_TIMEOUT_S)) is not None:
            yield [ListedObject(meta["path"], meta["size"]) for meta in page]

    async def probe(self) -> None:
        await _ask(anext(obstore.list(self._store, offset=LAST_NAME), None), CONTROL_TIMEOUT_S)


async def _ask(call: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """Every wait on the service passes here: a deadline, and errors of ours."""
    with _translated():
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except TimeoutError as error:
            raise ObjectsUnreachable(f"no answer within {timeout_s:.0f} s") from error


@contextmanager
def _translated() -> Generator[None, None, None]:
    try:
        yield
    except (BaseError, OSError) as error:
        raise _translate(error) from error


def _translate(error: Exception) -> ObjectMissing | ObjectsUnreachable:
    """The library has types for some answers of some calls; the status is in its words for all of them."""
    reason = _reason(error)
    if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in reason:
        return ObjectMissing(reason)
    if isinstance(error, FileNotFoundError | PermissionDeniedError | UnauthenticatedError):
        return ObjectsRefused(reason)
    status = _STATUS.search(reason)
    if status is not None and status[1].startswith("4") and status[1] not in BUSY_STATUSES:
        return ObjectsRefused(reason)
    return ObjectsUnreachable(reason)


def _reason(error: Exception) -> str:
    """One line without secrets: what the service wrote, or else the library's words, which name the request."""
    text = " ".join(str(error).partition("Debug source")[0].split())
    status, said = _STATUS.search(text), _SAID.search(text)
    if status is not None and said is not None:
        return f"status code: {status[1]} {said[1]}: {said[2]}"[:REASON_CHARS_MAX]
    return text[:REASON_CHARS_MAX] or type(error).__name__


async def _let_go(body: memoryview) -> None:
    deadline_s = clock.now_s() + LET_GO_S
    while True:
        try:
            body.release()
            return
        except BufferError:
            if clock.now_s() > deadline_s:
                log.error("the client library holds memory of a put that is over")
                return
            await asyncio.sleep(LET_GO_POLL_S)


async def open_s3(url: str, node: str, nbytes: int, slot_bytes: int) -> ObjectTier:
    """The tier of one node in a bucket, with a budget of ``nbytes``; what is there already comes as it runs.

    A service that does not answer now is no error: the tier serves when it does.

    Raises:
        NoBucket: the service refuses, or the budget holds no block.
    """
    try:
        bucket, prefix = parse_url(url)
    except ValueError as error:
        raise NoBucket(str(error)) from error
    slots = nbytes // slot_bytes
    if slots < 1:
        raise NoBucket(f"an S3 tier of {nbytes} bytes holds no block of {slot_bytes} bytes")
    objects = S3Objects(bucket, f"{prefix}/{node}".lstrip("/"))
    try:
        await objects.probe()
    except ObjectsRefused as error:
        raise NoBucket(f"cannot use {url}: {error}") from error
    except ObjectsUnreachable as error:
        log.error("the S3 tier does not answer: the node serves without it until it does", url=url, reason=error)
    return ObjectTier("s3", objects, ThreadOffload("s3", COPY_THREADS), slots, slot_bytes)
