"""How a stock server is asked, and what it answers, before anybody knows which one it is. Pure."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from engines.adapter.footprint import Footprint
from tracehaul.wire.errors import ClusterError, ContextTooLong, InvalidRequest, Overloaded, ProtocolError
from tracehaul.wire.steps import FinishReason, Sampling, TokenLogprobs

MESSAGE_CHARACTERS_MAX = 500


class Ask(msgspec.Struct, frozen=True):
    """One request to a server: the rest of a step, or its first token."""

    rid: str
    """Names it there, and nothing else ever."""
    trace: str
    tokens: Sequence[int]
    """Prompt, and what was emitted."""
    prompt_tokens: int
    """How many of them are the prompt."""
    max_new: int
    """At least 1."""
    min_new: int
    sampling: Sampling
    salt: str = ""
    priority: int = 0
    due_s: float = 0.0
    """By the worker's clock; of those of equal priority the one that is due first goes first."""
    prompt_logprobs: int | None = None
    """As in :class:`tracehaul.wire.steps.DecodeStep`."""


class Request(NamedTuple):
    """What is posted."""

    path: str
    body: bytes
    streams: bool = True
    """The answer comes as server-sent events; if not, as one body."""


class Cached(NamedTuple):
    """Leading tokens that were not computed, by where they were."""

    device: int
    host: int = 0
    store: int = 0

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.device + self.host + self.store


class Chunk(msgspec.Struct):
    """What one event tells."""

    tokens: list[int] = []
    logprobs: Sequence[TokenLogprobs] | None = None
    """One for each of the tokens."""
    scores: Sequence[TokenLogprobs] = ()
    """Of the prompt's tokens from the second on; told once, before any token."""
    cached: Cached | None = None
    """If the event says."""
    finish: FinishReason | None = None


class Reader(Protocol):
    """Reads the answer to one request."""

    def read(self, data: bytes) -> Chunk:
        """The next event.

        Raises:
            ClusterError: the server says that it failed; ProtocolError: nobody can read that.
        """
        ...


class Facts(NamedTuple):
    """What a server is, fixed for its life."""

    version: str
    model: str
    """What it calls its model."""
    path: str
    """Where it has its model from."""
    context_max: int
    kv_tokens_max: int
    sequences_max: int
    priorities: bool = False
    """It schedules by a request's priority."""


class Figures(NamedTuple):
    """What a server says of its load. Sums are over its life."""

    running: int = 0
    waiting: int = 0
    used_tokens: int = 0
    prefill_s: float = 0.0
    """Spent on computing prompts."""
    prefill_tokens: int = 0
    """Computed in that time."""
    decode_s: float = 0.0
    """Between tokens of one answer, all such pauses together."""
    decode_steps: int = 0
    """How many pauses these are."""


class Dialect(Protocol):
    """One kind of server."""

    @property
    def name(self) -> str:
        """As in :attr:`tracehaul.wire.cluster.NodeInfo.engine`."""
        ...

    @property
    def tested(self) -> Sequence[str]:
        """Beginnings of the versions that this was made for."""
        ...

    @property
    def alive_path(self) -> str:
        """Answers at once with 200 while the server's front lives."""
        ...

    @property
    def load_path(self) -> str:
        """Answers with its load; may be :attr:`alive_path`."""
        ...

    @property
    def deep_path(self) -> str | None:
        """Answers with 200 if its engine computes; may take its time. None: there is no such check."""
        ...

    @property
    def fact_paths(self) -> Sequence[str]:
        """What answers to these is for :meth:`facts`."""
        ...

    def facts(self, answers: Sequence[bytes]) -> Facts:
        """What it is. Raises ProtocolError if it does not say."""
        ...

    def figures(self, answer: bytes) -> Figures:
        """What :attr:`load_path` has answered. Raises ProtocolError if nobody can read it."""
        ...

    def request(self, ask: Ask, facts: Facts) -> Request:
        """How that is asked for. Raises InvalidRequest if this engine cannot do it."""
        ...

    def reader(self, ask: Ask) -> Reader:
        """For the answer to that."""
        ...

    def abort(self, rid: str) -> Request | None:
        """What ends a request beside closing its connection; None: that is enough."""
        ...

    def afresh(self, nonce: str, turn: int) -> tuple[str, Request | None]:
        """How a prompt of a self-test is asked for again: the salt under which its blocks are found in the store and
        nothing of it in the server's own memory, and what is to be posted before."""
        ...

    def from_store(self, cached: Cached) -> int:
        """How many tokens of a prompt that was asked for like this came from the store."""
        ...

    def command(self, model: str, name: str, port: int, args: Sequence[str]) -> list[str]:
        """How a server is started, without the interpreter that runs it; ``args`` go last and so win."""
        ...

    def sharing(self, options: Mapping[str, object]) -> list[str]:
        """Options of a server whose plugin shares blocks through the store; ``options`` are the plugin's own."""
        ...

    def footprint(self, args: Sequence[str], token_bytes: int, *, shares: bool) -> Footprint:
        """What a server takes for KV that is started with these options; ``token_bytes`` of a token in all ranks."""
        ...

    @property
    def environment(self) -> Mapping[str, str]:
        """What a server that is started is to find in its environment."""
        ...


def failure(status: int, message: str) -> ClusterError:
    """What an answer with that status stands for."""
    message = " ".join(message.split())[:MESSAGE_CHARACTERS_MAX] or f"status {status}"
    if status in (400, 413, 422):
        about_length = (
            "context length" in message or "maximum context" in message or "input is longer" in message.lower()
        )
        return ContextTooLong(message) if about_length else InvalidRequest(message)
    if status in (429, 503):
        return Overloaded(message)
    return ClusterError(f"the engine's server failed ({status}): {message}")


def unreadable(what: str, data: bytes) -> ProtocolError:
    """What nobody can make sense of."""
    return ProtocolError(f"the engine's server answered {what} with {data[:80]!r}")


def scored(logprob: float | None, likely: Sequence[tuple[int, float]], top: int) -> TokenLogprobs:
    """With the ``top`` likeliest of those, which may be in any order and include the token itself."""
    best = sorted(likely, key=lambda item: -item[1])[:top]
    return TokenLogprobs(-9999.0 if logprob is None else logprob, tuple(best))
