"""The access log: one line for each request, one more for what runs in the background after it, and nothing of its
content unless that is asked for."""

from router.calls.events import Usage
from router.calls.run import Run
from router.http.access import ANYBODY, Caller
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log

log = Log(__name__)

LEFT = 499
"""The status of those whose client left before the end, as nginx has it."""
QUIET = frozenset({"/health", "/metrics"})
"""Pages that are asked for all the time: only refusals are logged."""


class Visit:
    """One request, as it becomes known."""

    def __init__(self, request: str, method: str, path: str) -> None:
        self.request = request
        """Its id."""
        self.method = method
        self.path = path
        self.caller: Caller = ANYBODY
        self.inside = False
        """The router asks itself, and has had its turn."""
        self.trace = ""
        self.tenant = ""
        self.model = ""
        self.usage: Usage | None = None
        self.asked = ""
        self.answered = ""
        self.began_s = clock.now_s()

    def again(self) -> "Visit":
        """For what goes on after its answer, and has a line of its own."""
        visit = Visit(self.request, self.method, self.path)
        visit.inside = self.inside
        visit.caller, visit.tenant, visit.model, visit.asked = self.caller, self.tenant, self.model, self.asked
        return visit

    def ran_as(self, other: "Visit") -> None:
        """What is known of its call is known of another visit."""
        self.trace, self.usage, self.answered = other.trace, other.usage, other.answered


class Visits:
    """Writes the lines. ``on``: else none; ``content``: with what was asked and answered."""

    def __init__(self, *, on: bool, content: bool) -> None:
        self.on = on
        self.content = on and content

    def ran(self, visit: Visit, run: Run) -> None:
        """Its call has, as far as it did."""
        if not self.on:
            return
        visit.usage = run.usage()
        if self.content and run.done:
            visit.answered = "\n".join(choice.said.content for choice in run.choices())

    def over(self, visit: Visit, status: int, first_s: float | None) -> None:
        """It was answered so, or its client left; ``first_s``: when the answer began."""
        if not self.on or (visit.path in QUIET and status < 400):
            return
        fields: dict[str, object] = {
            "request": visit.request,
            "method": visit.method,
            "path": visit.path[:256],
            "status": status,
            "key": "" if visit.caller.key is None else visit.caller.key.id,
            "tenant": visit.tenant,
            "took_s": clock.now_s() - visit.began_s,
        }
        if visit.trace:
            fields |= {"trace": visit.trace, "model": visit.model}
        if first_s is not None:
            fields["first_s"] = first_s - visit.began_s
        if visit.usage is not None:
            usage = visit.usage
            fields["prompt_tokens"] = usage.prompt_tokens
            fields["cached_tokens"] = usage.cached_tokens
            fields["output_tokens"] = usage.output_tokens
        if self.content:
            fields |= {"asked": visit.asked, "answered": visit.answered}
        log.info("a request was answered", **fields)
