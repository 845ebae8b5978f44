"""Figures of the runs of the AgentX harness."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.table import Table

from bench.agentx.arrangements import OURS
from bench.agentx.harness import Found
from bench.common.report import Result, percentile
from bench.common.usage import Usage

BUSY_MAX = 0.9
"""Where more of the cores' time is used it may be they, and not the simulated accelerators, that are waited for."""


class Run(NamedTuple):
    """One run of one arrangement."""

    found: Found
    used: Usage
    """Of the cores while it was measured; its own processes are the marked ones, without the harness."""

    @property
    def busy(self) -> float:
        """Share of the cores' time that anybody used."""
        return self.used.busy / self.used.total


class Figures(NamedTuple):
    """Of all runs of one arrangement together."""

    steps_per_h: float
    errors: int
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    hits: float
    """Of the prompts' tokens."""
    computed: float
    """Tokens of prompts, of each step."""
    cpu_s: float
    """Of the cores, of each step, without the harness."""
    busy: float
    """Share of the cores' time that anybody used, in the run where it was highest."""


def figures_of(runs: Sequence[Run]) -> Figures:
    """There must be a step."""
    steps = sum(run.found.steps for run in runs)
    waits_s = [wait_s for run in runs for wait_s in run.found.ttft_s]
    prompts, computed = (sum(getattr(run.found, of) for run in runs) for of in ("prompt_tokens", "computed_tokens"))
    return Figures(
        steps_per_h=3600 * steps / sum(run.found.seconds for run in runs),
        errors=sum(run.found.errors for run in runs),
        ttft_mean_s=sum(waits_s) / len(waits_s),
        ttft_p50_s=percentile(waits_s, 0.5),
        ttft_p99_s=percentile(waits_s, 0.99),
        hits=1 - computed / prompts,
        computed=computed / steps,
        cpu_s=sum(run.used.marked for run in runs) / steps,
        busy=max(run.busy for run in runs),
    )


def results_of(runs: Mapping[str, Sequence[Run]]) -> list[Result]:
    """Under their stable names."""
    results: list[Result] = []
    figures = {name: figures_of(those) for name, those in runs.items()}
    for name, of in figures.items():
        results += [
            Result(f"agentx.steps_per_h.{name}", of.steps_per_h, "1/h"),
            Result(f"agentx.errors.{name}", of.errors, "1"),
            Result(f"agentx.ttft.mean.{name}", of.ttft_mean_s, "s"),
            Result(f"agentx.ttft.p50.{name}", of.ttft_p50_s, "s"),
            Result(f"agentx.ttft.p99.{name}", of.ttft_p99_s, "s"),
            Result(f"agentx.hits.{name}", of.hits, "1"),
            Result(f"agentx.computed.{name}", of.computed, "tokens/step"),
            Result(f"agentx.cpu.{name}", of.cpu_s, "s/step"),
            Result(f"agentx.busy.{name}", of.busy, "1"),
        ]
    for name, of in figures.items():
        if name != OURS and OURS in figures:
            ratio = figures[OURS].steps_per_h / of.steps_per_h
            results.append(Result(f"agentx.over.{name}", ratio, "1", f"agentx.steps_per_h.{name}", ratio))
    return results


def table_of(runs: Mapping[str, Sequence[Run]]) -> Table:
    """A line for each arrangement."""
    table = Table("", "steps/h", "ours", "errors", "TTFT mean", "p50", "p99", "hits", "computed/step", "cores busy")
    for column in table.columns[1:]:
        column.justify = "right"
    figures = {name: figures_of(those) for name, those in runs.items()}
    for name, of in figures.items():
        over = f"{figures[OURS].steps_per_h / of.steps_per_h:.2f}x" if OURS in figures and name != OURS else ""
        waits = [f"{wait_s:.2f} s" for wait_s in (of.ttft_mean_s, of.ttft_p50_s, of.ttft_p99_s)]
        shares = [f"{of.hits:.1%}", f"{of.computed:.0f}", f"{of.busy:.0%}"]
        table.add_row(name, f"{of.steps_per_h:.0f}", over, str(of.errors), *waits, *shares)
    return table


def faults_of(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """What makes this no measurement, in words."""
    said: list[str] = []
    for name, those in runs.items():
        of = figures_of(those)
        if of.errors:
            said.append(f"{name}: {of.errors} errors")
        if of.busy > BUSY_MAX:
            said.append(f"{name}: {of.busy:.0%} of the cores' time was used: steps may have waited for them")
    return said
