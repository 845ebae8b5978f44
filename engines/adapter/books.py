"""What both roles share of one worker over a stock server: its server, its counts, how many steps it takes."""

from collections.abc import Generator
from contextlib import contextmanager

import msgspec

from engines.adapter.generating import Generating
from engines.adapter.ran import Ran
from engines.adapter.sharing import Sharing
from engines.adapter.stored import Stored
from engines.adapter.thinking import UNMARKED, Marks
from tracehaul.runtime import clock
from tracehaul.wire.errors import ClusterError, ContextTooLong, Overloaded, WrongNode
from tracehaul.wire.hashing import token_count
from tracehaul.wire.ids import BlockHash
from worker.config import WorkerConfig
from worker.meter import Account, Meter


class AdapterStats(msgspec.Struct):
    """Counters of one worker's life, for metrics; tokens unless they say otherwise."""

    steps: int = 0
    steps_failed: int = 0
    steps_aborted: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    device_tokens: int = 0
    """Found in the engine's own memory."""
    host_tokens: int = 0
    store_tokens: int = 0
    prefill_fallbacks: int = 0
    handed_off: int = 0
    """Steps whose prompt a prefill worker computed."""
    stored_late: int = 0
    """Prompts that were not all in the store when the wait for that ended."""
    servers_lost: int = 0
    tokens_again: int = 0
    """Said for a router that was lost, and told to another."""


class Outcome:
    """Of a step that runs."""

    ended = False
    """Its terminal message was told."""


class Books:
    """One worker's."""

    def __init__(
        self, root: BlockHash, generating: Generating, stored: Stored, limits: WorkerConfig, marks: Marks = UNMARKED
    ) -> None:
        self.root = root
        self.generating = generating
        self.stored = stored
        self.limits = limits
        self.marks = marks
        self.stats = AdapterStats()
        self.ran = Ran()
        self.meter = Meter()
        self.sharing = Sharing(self.meter)
        self.running = 0

    @property
    def context_max(self) -> int:
        """Longest sequence in tokens."""
        return self.generating.facts.context_max

    def check(self, root: BlockHash, packed: bytes) -> None:
        """Raises ClusterError unless a step over that sequence can run here."""
        if root != self.root:
            raise WrongNode("this worker's KV has another layout, or is of another model")
        tokens = token_count(packed)
        if tokens >= self.context_max:
            raise ContextTooLong(
                f"This model's maximum context length is {self.context_max} tokens. However, you requested "
                f"{tokens + 1} tokens"
            )

    @contextmanager
    def serving(self, account: Account) -> Generator[None]:
        """The server has a request for that step."""
        self.sharing.begins(account, clock.now_s())
        try:
            yield
        finally:
            self.sharing.ends(account, clock.now_s())

    @contextmanager
    def step(self) -> Generator[Outcome]:
        """One more runs, and is counted by how it ends: with its terminal message, an error, or a caller that leaves.

        Raises:
            Overloaded: there are too many.
        """
        if self.running >= self.limits.sequences_max + self.limits.waiting_max:
            raise Overloaded(f"{self.running} steps are with the engine's server")
        self.running += 1
        self.stats.steps += 1
        outcome = Outcome()
        try:
            yield outcome
        except ClusterError:
            outcome.ended = True
            self.stats.steps_failed += 1
            raise
        finally:
            self.stats.steps_aborted += not outcome.ended
            self.running -= 1
