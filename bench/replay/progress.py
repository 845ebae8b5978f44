"""What a person sees of a replay while it runs."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from bench.common.report import percentile
from bench.replay.run import Progress

LINE_EVERY_S = 10.0
"""Of progress, where there is no terminal."""


class _Observer:
    """Shows how far a replay is: one live line on a terminal, else a line now and then."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self._console = console
        self._live = live
        self._told_s = 0.0

    def __call__(self, progress: Progress) -> None:
        if self._live is None and progress.elapsed_s < self._told_s + LINE_EVERY_S:
            return
        self._told_s = progress.elapsed_s
        good = [record for record in progress.records if record.error is None]
        known = [record for record in good if record.cached_tokens is not None]
        cached = sum(record.cached_tokens or 0 for record in known)
        prompts = sum(record.prompt_tokens or 0 for record in known)
        first = [record.ttft_s for record in good if record.ttft_s is not None]
        parts = (
            f"{progress.elapsed_s:6.0f}s",
            f"{len(progress.records)}/{progress.steps} steps",
            f"{progress.running} running",
            f"{sum(trace.parent is None for trace in progress.completed)} traces done",
            f"{len(progress.records) - len(good)} errors",
            f"hits {cached / prompts:.3f}" if prompts else "",
            f"TTFT p50 {percentile(first, 0.5):.2f}s" if first else "",
        )
        if self._live is None:
            self._console.print("  ".join(part for part in parts if part), highlight=False, soft_wrap=True)
            return
        table = Table.grid(padding=(0, 2))
        table.add_row(*parts)
        self._live.update(table)


@contextmanager
def shown(console: Console) -> Generator[Callable[[Progress], None], None, None]:
    """What a replay tells how far it is."""
    if not console.is_terminal:
        yield _Observer(console, None)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield _Observer(console, live)
