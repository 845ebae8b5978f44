"""The control plane's bytes: 4 bytes of length (big endian), then one msgpack frame. No I/O.

The first frame each way is :class:`Hello`. Calls are numbered by the client, growing within a connection.
"""

import struct
from typing import Annotated

import msgspec

from tracehaul.wire import messages
from tracehaul.wire.errors import ProtocolError
from tracehaul.wire.ids import StepId, TraceId

MAGIC = "tracehaul"
VERSION = 1
FRAME_BYTES_MAX = 64 << 20
"""A longer frame ends the connection."""
HELLO_BYTES_MAX = 256
"""Nothing longer is taken from a peer that has not introduced itself."""
TIMEOUT_S_MAX = 86_400.0

_LENGTH_BYTES = 4

CallId = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Timeout = Annotated[float, msgspec.Meta(gt=0, le=TIMEOUT_S_MAX)]


class _Frame(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all frames: packed as arrays, since field names would be most of a small call's bytes."""


class Hello(_Frame, frozen=True, tag=0):
    """First each way: this is the protocol, this is its version."""

    magic: str = MAGIC
    version: int = VERSION


class Call(_Frame, frozen=True, tag=1):
    """Client: answer with one :class:`Reply` or :class:`Fail` within ``timeout_s``."""

    id: CallId
    request: messages.Request
    timeout_s: Timeout
    trace: TraceId | None = None
    step: StepId | None = None


class Open(_Frame, frozen=True, tag=2):
    """Client: answer with :class:`Item` frames, then one :class:`End` or :class:`Fail`."""

    id: CallId
    request: messages.Request
    trace: TraceId | None = None
    step: StepId | None = None


class Reply(_Frame, frozen=True, tag=3):
    """Server: the answer to a call."""

    id: CallId
    reply: messages.Reply


class Item(_Frame, frozen=True, tag=4):
    """Server: the next reply of a stream."""

    id: CallId
    reply: messages.Reply


class End(_Frame, frozen=True, tag=5):
    """Server: the stream is complete."""

    id: CallId


class Fail(_Frame, frozen=True, tag=6):
    """Server: the call or stream ended with an error (see :func:`tracehaul.wire.errors.error_from_code`)."""

    id: CallId
    code: str
    message: str


class Cancel(_Frame, frozen=True, tag=7):
    """Client: stop that call or stream; nothing more about it is wanted."""

    id: CallId


class Alive(_Frame, frozen=True, tag=8):
    """Server: these streams still have a handler. Sent every second while there are any."""

    ids: tuple[CallId, ...]


Frame = Hello | Call | Open | Reply | Item | End | Fail | Cancel | Alive

_TLS = (b"\x15\x03", b"\x16\x03")
"""How an alert and a client's greeting begin there."""

_encoder = msgspec.msgpack.Encoder()
_decode = msgspec.msgpack.Decoder(Frame).decode
_length_at = struct.Struct(">I").unpack_from


def pack(frame: Frame, frame_bytes_max: int = FRAME_BYTES_MAX) -> bytes:
    """Wire form of ``frame``, length included.

    Raises:
        ProtocolError: it is longer than any peer would take.
    """
    body = _encoder.encode(frame)
    if len(body) > frame_bytes_max:
        raise ProtocolError(f"a {type(frame).__name__} of {len(body)} bytes is over the limit of {frame_bytes_max}")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class FrameReader:
    """Cuts a byte stream into frames. Holds at most one frame's bytes beyond those fed last."""

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._buffer = bytearray()
        self._frame_bytes_max = frame_bytes_max
        self._limit = HELLO_BYTES_MAX

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """Frames completed by ``data``, in order.

        Raises:
            ProtocolError: the bytes are not frames of this version. The reader is of no further use.
        """
        buffer = self._buffer
        if buffer:
            buffer += data
            data = buffer
        frames: list[Frame] = []
        start, limit, size = 0, self._limit, len(data)
        with memoryview(data) as view:
            while (body := start + _LENGTH_BYTES) <= size:
                (nbytes,) = _length_at(view, start)
                if nbytes > limit:
                    if bytes(view[start : start + 2]) in _TLS:
                        raise ProtocolError("the peer speaks TLS, and this node does not")
                    raise ProtocolError(f"a frame of {nbytes} bytes is over the limit of {limit}")
                end = body + nbytes
                if end > size:
                    break
                try:
                    frames.append(_decode(view[body:end]))
                except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
                    raise ProtocolError(f"malformed frame: {error}") from None
                limit = self._frame_bytes_max
                start = end
            if data is not buffer:
                buffer += view[start:]
        self._limit = limit
        if data is buffer and start:
            del buffer[:start]
        return frames


def check_hello(frame: Frame) -> None:
    """Accept a peer's first frame.

    Raises:
        ProtocolError: the peer speaks something else, or another version.
    """
    if not isinstance(frame, Hello) or frame.magic != MAGIC:
        raise ProtocolError("the peer does not speak the tracehaul protocol")
    if frame.version != VERSION:
        raise ProtocolError(f"the peer speaks protocol version {frame.version}, this node speaks {VERSION}")
