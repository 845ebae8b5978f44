"""What must hold in every run, whatever goes wrong: small observers that keep books of their own.

Each is told what happened (by :mod:`sim.world`) and writes what must not have happened into :class:`Findings`. None
trusts the code under test for what it can know itself.
"""

import asyncio
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kvstore.node.node import StoreNode
from router.dispatch.steps import Finished, Output
from sim.loop import PROCESS
from tracehaul.engine.fake import TrueState, pack_rows
from tracehaul.runtime import clock
from tracehaul.wire.blocks import Leased, Publish, Published, Reserved, Slot
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.hashing import KVLayout, checksum, next_hash, pack_tokens
from tracehaul.wire.ids import BlockHash, LeaseId, SlotGeneration, StepId
from tracehaul.wire.messages import Reply
from tracehaul.wire.steps import PrefillDone, Sampling, StepDone

FOR_OPERATORS = ("a tier does not answer: its blocks are misses until it does",)
"""Errors that tell somebody to look at the world: faults, not bugs."""
FINDINGS_MAX = 10
"""Of one rule; more say nothing new."""


class Findings:
    """What was violated, in order, each with its virtual time."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._count: dict[str, int] = {}

    def add(self, rule: str, text: str) -> None:
        """``rule`` was violated."""
        self._count[rule] = self._count.get(rule, 0) + 1
        if self._count[rule] <= FINDINGS_MAX:
            self.lines.append(f"[{clock.now_s():.6f}] {rule}: {text}")


class TerminalChecker:
    """Every request ends in exactly one terminal message, and it is the last."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._open: dict[str, bool] = {}

    def began(self, request: str) -> None:
        """A request was made; ``request`` is unique."""
        if request in self._open:
            self._findings.add("terminal", f"{request} began twice")
        self._open[request] = False

    def message(self, request: str, *, terminal: bool) -> None:
        """It was answered with a message."""
        if self._open.get(request) is not False:
            self._findings.add("terminal", f"{request}: a message after the terminal one")
        if terminal:
            self._open[request] = True

    def ended(self, request: str, *, cut_off: bool) -> None:
        """Nothing follows; ``cut_off``: by an error, or because the asker left."""
        if self._open.pop(request, None) is False and not cut_off:
            self._findings.add("terminal", f"{request} ended without a terminal message")

    def died(self, process: str) -> None:
        """Requests that begin with its name end with it: the world, not we, ended them."""
        self._open = {request: done for request, done in self._open.items() if not request.startswith(f"{process} ")}

    def finish(self) -> None:
        """The run is over."""
        for request in self._open:
            self._findings.add("terminal", f"{request} never ended")


def is_terminal(reply: Reply | Output | Finished) -> bool:
    """Whether nothing may follow it."""
    return isinstance(reply, StepDone | PrefillDone | Finished)


class OutputChecker:
    """What a client receives is what a single process would have emitted: nothing lost, doubled or sampled anew."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def output(self, step: StepId, received: Sequence[int], expected: Sequence[int]) -> None:
        """All that the client has so far of ``step``."""
        if list(received) != list(expected[: len(received)]):
            self._findings.add("output", f"{step}: received {list(received)}, expected {list(expected)}")

    def finished(
        self, step: StepId, done: Finished, prompt: int, received: Sequence[int], expected: Sequence[int], how: Sampling
    ) -> None:
        """The step ended with ``done`` after ``received``."""
        if list(received) != list(expected):
            self._findings.add("output", f"{step}: finished with {list(received)}, expected {list(expected)}")
            return
        reason = "stop" if received[-1] in how.stop_tokens and len(received) >= how.min_tokens else "length"
        if done.reason != reason:
            self._findings.add("output", f"{step}: finished by {done.reason}, expected {reason}")
        if (done.usage.prompt_tokens, done.usage.output_tokens) != (prompt, len(received)):
            self._findings.add("output", f"{step}: {prompt}+{len(received)} tokens, but usage is {done.usage}")


class _Grant(NamedTuple):
    writer: str
    generation: SlotGeneration


class _Hold(NamedTuple):
    offsets: tuple[int, ...]
    until_s: float


class VisibleBlock(NamedTuple):
    """A published block in a store's memory."""

    hash: BlockHash
    offset: int
    size_bytes: int
    checksum: int


class SlotChecker:
    """Nothing is evicted or overwritten under a live lease; nothing is read that was not published.

    Keeps its own ledger of one store node's life, from the answers that the node gave.
    """

    def __init__(
        self,
        findings: Findings,
        store: str,
        node: StoreNode,
        buffer: memoryview,
        known: set[BlockHash] | None = None,
    ) -> None:
        """``known``: what may come up from a tier, whose slots have generations of their own; None without one."""
        self._findings = findings
        self._store = store
        self._known = known
        self._node = node
        self._buffer = buffer
        self._grants: dict[int, _Grant] = {}
        self._leases: dict[tuple[str, LeaseId], _Hold] = {}
        self._published: set[tuple[BlockHash, SlotGeneration]] = set()
        self._gone_peers: dict[str, float] = {}
        self.rotten: set[BlockHash] = set()
        """Blocks whose bytes a fault changed: their checksums may fail."""

    def reserved(self, peer: str, reply: Reserved) -> None:
        """The node gave ``peer`` slots to write."""
        for outcome in reply.outcomes:
            if not isinstance(outcome, Slot):
                continue
            for (holder, lease), hold in self._live().items():
                if outcome.offset in hold.offsets:
                    text = f"slot {outcome.offset} given to {peer} under lease {lease} of {holder}"
                    self._findings.add("lease", f"{self._store}: {text}")
            self._grants[outcome.offset] = _Grant(_process(peer), outcome.generation)

    def publishing(self, peer: str, request: Publish, reply: Published) -> None:
        """The node answered a publish."""
        for block, outcome in zip(request.blocks, reply.outcomes, strict=True):
            if outcome == "published":
                self._published.add((block.hash, block.generation))
                if self._known is not None:
                    self._known.add(block.hash)

    def leased(self, peer: str, hashes: Sequence[BlockHash], reply: Leased) -> None:
        """The node granted a lease."""
        offsets: list[int] = []
        for block_hash, block in zip(hashes, reply.blocks, strict=True):
            if block is None:
                continue
            offsets.append(block.offset)
            came_up = self._known is not None and block_hash in self._known
            if (block_hash, block.generation) not in self._published and not came_up:
                self._findings.add("publish", f"{self._store}: {block_hash.hex()} leased but never published")
            actual = checksum(self._buffer[block.offset : block.offset + block.size_bytes])
            if actual != block.checksum and block_hash not in self.rotten:
                self._findings.add("bytes", f"{self._store}: {block_hash.hex()} leased with wrong bytes in its slot")
        self._leases[peer, reply.lease] = _Hold(tuple(offsets), clock.now_s() + reply.ttl_s)

    def released(self, peer: str, lease: LeaseId) -> None:
        """The holder ended it."""
        self._leases.pop((peer, lease), None)

    def disconnected(self, peer: str) -> None:
        """The node lost that connection: what it held ends."""
        self._gone_peers[_process(peer)] = clock.now_s()
        for key in [key for key in self._leases if key[0] == peer]:
            del self._leases[key]

    def grants(self, writer: str, offsets: Sequence[int]) -> list[SlotGeneration | None]:
        """A write starts: under which reservations of this writer."""
        found = [self._grants.get(offset) for offset in offsets]
        return [grant.generation if grant is not None and grant.writer == writer else None for grant in found]

    def written(self, writer: str, offsets: Sequence[int], grants: Sequence[SlotGeneration | None]) -> None:
        """Bytes of a write that started under ``grants`` land now."""
        for offset, generation in zip(offsets, grants, strict=True):
            for (holder, lease), hold in self._live().items():
                if offset in hold.offsets:
                    text = f"{writer} wrote into slot {offset} under lease {lease} of {holder}"
                    self._findings.add("lease", f"{self._store}: {text}")
            grant = self._grants.get(offset)
            if generation is None or grant is None or grant.generation != generation:
                text = f"{writer} wrote into slot {offset} that was given to another meanwhile ({generation}, {grant})"
                self._findings.add("fence", f"{self._store}: {text}")

    def promoted(self, offset: int) -> None:
        """The node's tier writes into a slot now: no lease may cover it, and no earlier writer owns it any more."""
        self._grants.pop(offset, None)
        for (holder, lease), hold in self._live().items():
            if offset in hold.offsets:
                text = f"the tier wrote into slot {offset} under lease {lease} of {holder}"
                self._findings.add("lease", f"{self._store}: {text}")

    def reading(self, reader: str, offsets: Sequence[int]) -> None:
        """A read starts: a lease must cover it, unless the node lost the reader's connection and ended it."""
        held = {
            offset
            for (holder, _), hold in self._live().items()
            if _process(holder) == reader
            for offset in hold.offsets
        }
        if reader in self._gone_peers:
            return
        for offset in offsets:
            if offset not in held:
                self._findings.add("lease", f"{self._store}: {reader} reads slot {offset} without a lease")

    def contents(self, truth: "Truth") -> None:
        """Every published block has the bytes that were promised, and those of its tokens where they are known."""
        for block in self.visible():
            data = bytes(self._buffer[block.offset : block.offset + block.size_bytes])
            if block.hash in self.rotten:
                continue
            if checksum(data) != block.checksum:
                self._findings.add("bytes", f"{self._store}: {block.hash.hex()} does not match its checksum")
            expected = truth.block(block.hash)
            if expected is not None and data != expected:
                self._findings.add("bytes", f"{self._store}: {block.hash.hex()} is not the KV of its tokens")

    def visible(self) -> list["VisibleBlock"]:
        """Every visible block; read from behind, since no message says it all."""
        arena = self._node.arena
        slot_bytes = arena.config.slot_bytes
        sizes, sums = arena.table.size, arena.table.checksum
        slots = arena.table.published
        return [VisibleBlock(block, slot * slot_bytes, sizes[slot], sums[slot]) for block, slot in slots.items()]

    def _live(self) -> dict[tuple[str, LeaseId], _Hold]:
        now_s = clock.now_s()
        return {key: hold for key, hold in self._leases.items() if hold.until_s > now_s}


def _process(peer: str) -> str:
    """The node's address in a connection's name."""
    return peer.rpartition("#")[0]


class Truth:
    """KV bytes by block hash, of everything that clients know; computed without any cluster."""

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._blocks: dict[BlockHash, tuple[TrueState, int, int]] = {}

    def add(self, salt: str, state: TrueState) -> None:
        """Learn all full and partial blocks of one sequence."""
        parent = self._layout.root(salt)
        size = self._layout.block_tokens
        for start in range(0, len(state.tokens), size):
            for end in range(start + 1, min(start + size, len(state.tokens)) + 1):
                block = next_hash(parent, pack_tokens(state.tokens[start:end]))
                self._blocks.setdefault(block, (state, start, end))
                if end == start + size:
                    parent = block

    def block(self, block_hash: BlockHash) -> bytes | None:
        """Its packed bytes; None if no client knows its tokens."""
        known = self._blocks.get(block_hash)
        if known is None:
            return None
        state, start, end = known
        return pack_rows(self._layout, state.kv[start:end])


class CachedChecker:
    """No step claims more cached tokens than anybody could have had: the longest prefix in common with the past."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._known: dict[str, dict[str, list[int]]] = {}
        self.prompt_tokens = 0
        self.claimed_tokens = 0

    def began(self, salt: str, step: str, tokens: Sequence[int]) -> None:
        """From now on some worker may hold KV of any prefix of ``tokens``: the whole sequence of that step."""
        self._known.setdefault(salt, {})[step] = list(tokens)

    def finished(self, salt: str, step: str, prompt: Sequence[int], done: Finished, *, moved: bool) -> None:
        """A step ended; ``moved``: an earlier attempt at it may have left something."""
        claimed = done.usage.computed_from
        self.prompt_tokens += len(prompt)
        self.claimed_tokens += claimed
        if claimed >= len(prompt):
            self._findings.add("cached", f"{step}: {claimed} of {len(prompt)} prompt tokens cached: nothing computed")
        others = [known for key, known in self._known.get(salt, {}).items() if moved or key != step]
        possible = max((common(prompt, known) for known in others), default=0)
        if claimed > possible:
            self._findings.add("cached", f"{step}: {claimed} tokens cached, but at most {possible} were ever known")

    def finish(self, computed_tokens: int) -> None:
        """The run is over; engines computed so many tokens in all."""
        least = self.prompt_tokens - self.claimed_tokens
        if computed_tokens < least:
            self._findings.add("cached", f"engines computed {computed_tokens} tokens, claims leave at least {least}")


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class ReferenceChecker:
    """When all work has ended and every timeout passed, nobody holds anything for anybody."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def zero(self, where: str, **counts: int) -> None:
        """All of ``counts`` must be 0."""
        for name, count in counts.items():
            if count:
                self._findings.add("references", f"{where}: {count} {name} left")

    def same(self, where: str, what: str, a: object, b: object) -> None:
        """Two views of one thing must agree."""
        if a != b:
            self._findings.add("references", f"{where}: {what}: {a} is not {b}")


class IntegrityChecker:
    """Each part's own account of itself adds up."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def check(self, where: str, check: Callable[[], None]) -> None:
        """``check`` asserts."""
        try:
            check()
        except AssertionError as error:
            line = traceback.extract_tb(error.__traceback__)[-1].line
            self._findings.add("integrity", f"{where}: {line} {error}")


class IndexChecker:
    """The router's index ends equal to what the stores hold."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def compare(self, store: str, indexed: Mapping[BlockHash, int], held: Mapping[BlockHash, int]) -> None:
        """One node: blocks, and the tier of each."""
        if indexed != held:
            more, fewer = indexed.keys() - held.keys(), held.keys() - indexed.keys()
            moved = sum(indexed[block] != held[block] for block in indexed.keys() & held.keys())
            text = f"{len(more)} blocks too many, {len(fewer)} missing, {moved} in another tier"
            self._findings.add("index", f"{store}: the router has {text}")


class ProgressChecker:
    """Once everything is healed, every step succeeds, and soon."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.healed_s: float | None = None
        self.grace_s = 15.0
        """Timeouts and back-offs from before may last that long."""
        self.calm = False
        """No fault was planned: nothing may fail at any time."""

    def failed(self, step: StepId, began_s: float, error: ClusterError) -> None:
        """An attempt that began at ``began_s`` ended with ``error``."""
        if not error.retriable:
            self._findings.add("progress", f"{step}: failed for good with {error.code}: {error}")
        elif self.calm:
            self._findings.add("progress", f"{step}: failed in a calm run with {error.code}: {error}")
        elif self.healed_s is not None and began_s > self.healed_s + self.grace_s:
            self._findings.add("progress", f"{step}: failed after healing with {error.code}: {error}")

    def stuck(self, what: str) -> None:
        """It never ended."""
        self._findings.add("progress", f"{what} never ended after healing")


class AbortChecker:
    """An abort frees everything within a second."""

    ALLOWED_S = 1.0

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._aborted: dict[StepId, float] = {}

    def aborted(self, step: StepId) -> None:
        """Its client left."""
        self._aborted[step] = clock.now_s()

    def handler_ended(self, process: str, step: StepId) -> None:
        """A worker's handler for that step has ended, its resources freed."""
        left_s = self._aborted.get(step)
        if left_s is not None and clock.now_s() - left_s > self.ALLOWED_S:
            self._findings.add(
                "abort", f"{step}: {process} let go of it {clock.now_s() - left_s:.3f} s after the abort"
            )


class BugChecker(logging.Handler):
    """No error is logged, no task fails unseen: those are ours, the world's faults have answers."""

    def __init__(self, findings: Findings) -> None:
        super().__init__(logging.ERROR)
        self._findings = findings
        self.dead: set[str] = set()
        """Processes that no longer exist: what their remains do is of no interest."""

    def emit(self, record: logging.LogRecord) -> None:
        """An error was logged."""
        if PROCESS.get() in self.dead or record.name == asyncio.__name__:
            return  # asyncio's own reports come through the loop, with their exception
        if record.getMessage() in FOR_OPERATORS:
            return
        error = record.exc_info[1] if record.exc_info else None
        self._findings.add("bug", f"{PROCESS.get() or 'outside'} {record.name}: {record.getMessage()} {error!r}")

    def uncaught(self, lines: Sequence[str]) -> None:
        """Exceptions that reached the event loop."""
        for line in lines:
            self._findings.add("bug", line)
