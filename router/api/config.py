"""Limits of the HTTP surface."""

import msgspec


class ApiConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every limit that a client can meet, and what it is told there."""

    requests_max: int = 1024
    """Generation calls in progress; one more is answered 503."""
    body_bytes_max: int = 8 * 2**20
    """Longer bodies are answered 413 without being read to the end."""
    body_timeout_s: float = 30.0
    """A client that takes longer to send its body is answered 408."""
    send_timeout_s: float = 60.0
    """A client that reads nothing for this long is taken for gone."""
    keepalive_s: float = 10.0
    """After this much silence a stream starts, if it has not, and carries a comment."""
    choices_max: int = 64
    """Choices of one call: prompts times ``n``."""
    traces_max: int = 4096
    """Traces whose text is remembered with the ids it was generated with."""
    texts_bytes_max: int = 256 * 2**20
    """Memory for those."""
