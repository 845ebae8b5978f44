"""``tracehaul whatif``: a router's log of decisions, made anew by another policy."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from cluster.decision_file import log_of
from cluster.rundir import ClusterFault
from router.policy.hindsight import Redone, Summary, summary, through
from router.policy.placement import Policy

STEPS_SHOWN = 10


class WhatIf(msgspec.Struct, frozen=True):
    """What would have differed."""

    policy: Policy
    steps: int
    elsewhere: int
    """Of the steps, those that would have run, or would have had their prompts computed, elsewhere."""
    again: int
    """Those for which the policy that was in force chooses once more what it chose."""
    was: Summary
    would: Summary
    most: list[Redone]
    """Of those that differ, the ones whose expected seconds differ most."""


def whatif(path: Path, policy: Policy, knobs: Mapping[str, float] | None = None) -> WhatIf:
    """Read a log and make its decisions anew; ``knobs``: those that are not as they were when a step came.

    Raises:
        ClusterFault: it cannot be read, or has none that can be made anew.
    """
    try:
        redone = through(log_of(path), policy, knobs or {})
    except OSError as error:
        raise ClusterFault(f"the log cannot be read: {error}") from error
    if not redone:
        raise ClusterFault(f"{path} has no decision of this version that says what it was based on")
    differ = [one for one in redone if one.differs]
    most = sorted(differ, key=lambda one: -abs(one.would.cost_s - one.was.cost_s))[:STEPS_SHOWN]
    again = sum(one.again for one in redone)
    return WhatIf(
        policy, len(redone), len(differ), again, summary(redone, would=False), summary(redone, would=True), most
    )


def tables(found: WhatIf) -> list[Table]:
    """To be shown."""
    both = Table("", "as it was", f"{found.policy}", title=_title(found))
    for column in (1, 2):
        both.columns[column].justify = "right"
    for name, was, would in _rows(found.was, found.would):
        both.add_row(name, was, would)
    shown = [both]
    if found.most:
        shown.append(_most(found.most))
    return shown


def _title(found: WhatIf) -> str:
    share = 100 * found.elsewhere / found.steps
    title = f"{found.elsewhere} of {found.steps} steps ({share:.1f} %) would have gone elsewhere"
    if found.again < found.steps:
        title += f"; for {found.steps - found.again} the log does not say enough to choose the same again"
    return title


def _rows(was: Summary, would: Summary) -> list[tuple[str, str, str]]:
    def share(value: float) -> str:
        return f"{100 * value:.1f} %"

    def seconds(value: float) -> str:
        return f"{value:.3f} s"

    return [
        ("on the worker with its context", share(was.stays), share(would.stays)),
        ("expected cost of a step", seconds(was.cost_s), seconds(would.cost_s)),
        ("  of one in twenty at least", seconds(was.cost_p95_s), seconds(would.cost_p95_s)),
        ("prompt tokens expected cached", share(was.cached), share(would.cached)),
        ("prompts given to prefill workers", share(was.helped), share(would.helped)),
        ("busiest worker's share of steps", share(was.busiest), share(would.busiest)),
    ]


def _most(redone: Sequence[Redone]) -> Table:
    table = Table("trace", "step", "ran on", "expected", "would on", "expected", "because", title="What differs most")
    for one in redone:
        table.add_row(
            one.trace,
            one.step,
            _where(one.was.decode.node, one.was.prefill),
            f"{one.was.cost_s:.3f} s",
            _where(one.would.decode.node, one.would.prefill),
            f"{one.would.cost_s:.3f} s",
            one.would.reason,
        )
    return table


def _where(decode: str, prefill: str | None) -> str:
    return decode if prefill is None else f"{decode} + {prefill}"
