"""Limits of the HTTP surface, and who may use it."""

from typing import Annotated

from msgspec import Meta

from router.calls.limits import CallLimits, Count

Seconds = Annotated[float, Meta(gt=0)]


class ApiConfig(CallLimits, frozen=True, forbid_unknown_fields=True):
    """Every limit that a client can meet, and what it is told there."""

    body_bytes_max: Count = 8 * 2**20
    """Longer bodies are answered 413 without being read to the end."""
    body_timeout_s: Seconds = 30.0
    """A client that takes longer to send its body is answered 408."""
    send_timeout_s: Seconds = 60.0
    """A client that reads nothing for this long is taken for gone."""
    keepalive_s: Seconds = 10.0
    """After this much silence a stream starts, if it has not, and carries a comment."""
    idempotency_bytes_max: Count = 64 * 2**20
    """Memory for answers to calls with an ``Idempotency-Key``, packed; beyond it the oldest are forgotten."""
    idempotency_age_s: Seconds = 86400.0
    """Older ones are forgotten, too."""
    idempotency_grace_s: Seconds = 30.0
    """Such a call goes on for so long when its client has left, for the client to come back."""
    responses_max: Count = 4096
    """Responses that are kept for later calls (``store``); beyond it, as beyond the next, old ones are forgotten."""
    responses_bytes_max: Count = 256 * 2**20
    responses_age_s: Seconds = 86400.0
    """Older ones are forgotten, too."""
    chats_max: Count = 10_000
    """Chat completions that are kept (``store``); beyond it, as beyond the next, old ones are forgotten."""
    chats_bytes_max: Count = 2**30
    chats_age_s: Seconds = 30 * 86400.0
    """Older ones are forgotten, too."""
    background_max: Count = 64
    """Responses that run in the background; more are answered 503. A key's tenant has no more of them than are free
    beside; more are answered 429."""
    files_dir: str = ""
    """Where files are that clients upload, and batches; empty: in the run directory."""
    files_url: str = ""
    """``s3://bucket/prefix``: there instead, and what is known of them in the database; routers share both. Endpoint
    and credentials come from the environment, as those of ``s3_url``."""
    file_bytes_max: Count = 512 * 2**20
    """Longer ones are answered 413."""
    files_bytes_max: Count = 64 * 2**30
    """Of each tenant's files; with more, or with more of them than the next, uploads are answered 503."""
    files_max: Count = 10_000
    batches_max: Count = 100
    """Batches of each tenant that are not over; more are answered 429."""
    batch_concurrency: Count = 64
    """Calls of the background in progress, lines of batches above all; what the fleet has room for may be less."""
    flex_wait_s: Seconds = 600.0
    """A call of the background (``service_tier`` flex) waits so long for room; then it is answered 429."""
    connections_max: Count = 8192
    """Open connections; calls on more are answered 503, and still more connections are closed."""
    headers_timeout_s: Seconds = 20.0
    """A connection whose headers are not complete by then is closed."""
    headers_bytes_max: Count = 64 * 2**10
    """More of them are answered 431."""
    keys_file: str = ""
    """API keys, as ``tracehaul keys`` writes them; empty: nobody is asked for one."""
    open: bool = False
    """Without keys, addresses beyond this machine may be listened on."""
    tls_cert: str = ""
    """The certificate's chain, in PEM; with it the API is served over TLS alone."""
    tls_key: str = ""
    """Its private key; empty: it is in the same file."""
    origins: tuple[str, ...] = ()
    """Web pages of these origins may use the API from a browser; ``*``: all."""
    access_log: bool | None = None
    """A line in the log for each request; None: where there are keys."""
    log_content: bool = False
    """With what was asked and answered."""
