"""The base of all messages between processes, and those that say nothing more than that they came.

Messages are frozen tagged structs, in one union per direction (:mod:`tracehaul.wire.messages`). A tag that no version
knows raises at the border. Times are durations in seconds (clocks are never compared across processes); sizes are
bytes; token ids travel packed (see :func:`tracehaul.wire.hashing.pack_tokens`).
"""

import msgspec


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all wire messages; the class name is the tag."""


class Ok(Message, frozen=True):
    """Done, nothing to say."""


class Ping(Message, frozen=True):
    """Anyone -> anyone; answered with :class:`Ok`."""
