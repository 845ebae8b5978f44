"""A stream as OpenAI frames it: server-sent events, and a word at the end. Pure."""

import msgspec

DONE = b"data: [DONE]\n\n"


def event(data: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"
