"""What must hold in every run, whatever goes wrong: small observers that keep books of their own.

Each is told what happened (by :mod:`sim.world`) and writes what must not have happened into :class:`Findings`. None
trusts the code under test for what it can know itself.
"""

import asyncio
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import NamedTuple

from sim.answers import CallFailed
from sim.loop import PROCESS
from tracehaul.runtime import clock
from tracehaul.wire.ids import BlockHash, TraceId
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


def is_terminal(reply: Reply) -> bool:
    """Whether nothing may follow it."""
    return isinstance(reply, StepDone | PrefillDone)


class Ended(NamedTuple):
    """How a step ended, as its client was told."""

    reason: str
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    """Of the prompt."""


class OutputChecker:
    """What a client receives is what a single process would have emitted: nothing lost, doubled or sampled anew."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def prompt(self, step: str, told: Sequence[int], possible: Sequence[Sequence[int]]) -> None:
        """What was asked in ``step`` became the tokens ``told``: none of those that it may become."""
        self._findings.add("prompt", f"{step}: the prompt is {list(told)}, expected one of {list(map(list, possible))}")

    def output(self, step: str, received: Sequence[int], expected: Sequence[int]) -> None:
        """All that the client has so far of ``step``."""
        if list(received) != list(expected[: len(received)]):
            self._findings.add("output", f"{step}: received {list(received)}, expected {list(expected)}")

    def told_once(self, step: str, what: str, before: str | None) -> None:
        """The client is told ``what``, and was told ``before``."""
        if before is not None:
            self._findings.add("output", f"{step}: a second {what}, after {before}")

    def marks(self, step: str, told: int, tokens: int) -> None:
        """The client was told another number of logprobs than it asked for."""
        self._findings.add("output", f"{step}: {told} logprobs of {tokens} tokens")

    def text(self, step: str, told: str, received: str) -> None:
        """The text that the client was told, and that of the tokens that it was told."""
        if told != received:
            self._findings.add("text", f"{step}: {told!r} is not the text of its tokens, {received!r}")

    def finished(
        self, step: str, done: Ended, prompt: int, received: Sequence[int], expected: Sequence[int], how: Sampling
    ) -> None:
        """The step ended with ``done`` after ``received``."""
        if list(received) != list(expected):
            self._findings.add("output", f"{step}: finished with {list(received)}, expected {list(expected)}")
            return
        reason = "stop" if received[-1] in how.stop_tokens and len(received) >= how.min_tokens else "length"
        if done.reason != reason:
            self._findings.add("output", f"{step}: finished by {done.reason}, expected {reason}")
        if (done.prompt_tokens, done.output_tokens) != (prompt, len(received)):
            self._findings.add("output", f"{step}: {prompt}+{len(received)} tokens, but usage is {done}")


class CachedChecker:
    """No step claims more cached tokens than anybody could have had: the longest prefix in common with the past."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._known: dict[str, dict[str, Sequence[Sequence[int]]]] = {}
        self.prompt_tokens = 0
        self.claimed_tokens = 0

    def began(self, salt: str, step: str, sequences: Sequence[Sequence[int]]) -> None:
        """From now on some worker may hold KV of any prefix of one of these: all that the step's sequence may be."""
        self._known.setdefault(salt, {})[step] = sequences

    def finished(self, salt: str, step: str, prompt: Sequence[int], claimed: int, *, moved: bool) -> None:
        """A step ended, with so many tokens cached; ``moved``: an earlier attempt at it may have left something."""
        self.prompt_tokens += len(prompt)
        self.claimed_tokens += claimed
        if claimed >= len(prompt):
            self._findings.add("cached", f"{step}: {claimed} of {len(prompt)} prompt tokens cached: nothing computed")
        known = self._known.get(salt, {})
        others = [one for key, sequences in known.items() if moved or key != step for one in sequences]
        possible = max((common(prompt, one) for one in others), default=0)
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


class SampledChecker:
    """No token that a client has of a step it can ask for again is sampled again, as long as the router lives."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._had: dict[str, tuple[str, int]] = {}
        """Of each step: by which life of the router it was told, and how many tokens its client has."""
        self.again = 0
        """Times that one was gone on with."""

    def received(self, step: str, router: str, tokens: int) -> None:
        """The client of ``step`` has so many tokens, told by that life of the router."""
        before, had = self._had.get(step, (router, 0))
        self._had[step] = router, max(tokens, had if before == router else 0)

    def asked(self, step: str, router: str, emitted: int) -> None:
        """That life of a router asks a worker for what follows the first ``emitted`` tokens."""
        told_by, had = self._had.get(step, ("", 0))
        if told_by != router:
            return
        self.again += 1
        if emitted < had:
            self._findings.add("sampled", f"{step}: asked for token {emitted + 1}, of which its client has {had}")


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

    def failed(self, step: str, began_s: float, failure: CallFailed) -> None:
        """An attempt that began at ``began_s`` ended with ``failure``."""
        if not failure.retriable:
            self._findings.add("progress", f"{step}: failed for good with {failure}")
        elif self.calm:
            self._findings.add("progress", f"{step}: failed in a calm run with {failure}")
        elif self.healed_s is not None and began_s > self.healed_s + self.grace_s:
            self._findings.add("progress", f"{step}: failed after healing with {failure}")

    def stuck(self, what: str) -> None:
        """It never ended."""
        self._findings.add("progress", f"{what} never ended after healing")


class RoleChecker:
    """Where nothing else goes wrong there is always a worker of each role that keeps it, and one changes at a time."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def audit(self, roles: Sequence[tuple[str, bool]]) -> None:
        """Each worker's role now, and whether it is about to have another."""
        keep = {role for role, leaves in roles if not leaves}
        if keep != {"prefill", "decode"} or sum(leaves for _, leaves in roles) > 1:
            self._findings.add("roles", f"roles, and whether they are being changed: {list(roles)}")


class AbortChecker:
    """An abort frees everything within a second. A trace has one step at a time."""

    ALLOWED_S = 1.0

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._aborted: dict[TraceId, list[tuple[float, float]]] = {}
        """When each client left, and when it asked again: what began before that was for the step that it left."""

    def aborted(self, trace: TraceId) -> None:
        """The client of its step left."""
        self._aborted.setdefault(trace, []).append((clock.now_s(), inf))

    def asked(self, trace: TraceId) -> None:
        """The client asks for its next step."""
        left = self._aborted.get(trace)
        if left is not None and left[-1][1] == inf:
            left[-1] = (left[-1][0], clock.now_s())

    def handler_ended(self, process: str, trace: TraceId, began_s: float) -> None:
        """A worker's handler of a step has ended, its resources freed."""
        now_s = clock.now_s()
        for left_s, again_s in self._aborted.get(trace, ()):
            if began_s < again_s and now_s - left_s > self.ALLOWED_S:
                text = f"{trace}: {process} let go of its step {now_s - left_s:.3f} s after the abort"
                self._findings.add("abort", text)
                return


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
