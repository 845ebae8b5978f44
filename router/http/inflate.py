"""Compressed bodies, unpacked in small parts that never exceed what is allowed. Pure."""

import zlib
from collections.abc import Iterator

from router.calls.errors import CallFailed, invalid

PART_BYTES = 1 << 18
"""Unpacked at a time: about a millisecond."""

_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": zlib.MAX_WBITS}
"""What zlib calls these forms; HTTP's ``deflate`` is zlib's own."""


class Inflation:
    """One body that arrives in its form: feed it, then :meth:`end` it."""

    def __init__(self, coding: str) -> None:
        self._window = _WINDOWS[coding]
        self._coding = coding
        self._member = zlib.decompressobj(self._window)
        self.size = 0
        """Bytes unpacked so far."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What ``data`` adds, in parts of at most :data:`PART_BYTES`; may be empty ones.

        Raises:
            CallFailed: it is not of that form.
        """
        part = b""
        # A part of full size may leave some of it inside, though all was read.
        while data or (len(part) == PART_BYTES and not self._member.eof):
            if self._member.eof:
                if self._window == zlib.MAX_WBITS:
                    raise _broken(self._coding, "something follows its end")
                self._member = zlib.decompressobj(self._window)  # a gzip file may be several, one after another
            try:
                part = self._member.decompress(data, PART_BYTES)
            except zlib.error as error:
                raise _broken(self._coding, str(error)) from None
            data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            self.size += len(part)
            yield part

    def end(self) -> None:
        """Nothing more comes.

        Raises:
            CallFailed: something is missing.
        """
        if not self._member.eof:
            raise _broken(self._coding, "it ends too early")


def inflation(codings: str) -> Inflation | None:
    """What unpacks a body with that ``Content-Encoding``; None: it is not packed.

    Raises:
        CallFailed: nobody here can unpack it.
    """
    named = [coding for part in codings.split(",") if (coding := part.strip().lower()) not in ("", "identity")]
    if not named:
        return None
    if len(named) == 1 and named[0] in _WINDOWS:
        return Inflation(named[0])
    told = ", ".join(named)[:128]
    message = f"the content encoding {told!r} is not supported: send gzip, deflate, or none"
    raise CallFailed("unsupported_media", message, code="unsupported_content_encoding")


def _broken(coding: str, why: str) -> CallFailed:
    return invalid(f"the body is not what its content encoding {coding} promises: {why}", code="invalid_encoding")
