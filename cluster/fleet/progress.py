"""Shows how far each host is: a live table on a terminal, else a line per change."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from tracehaul.runtime import clock

DONE = "ready"


class Progress:
    """Of several hosts, or nodes."""

    def __init__(self, console: Console, names: Sequence[str], live: Live | None) -> None:
        self._console = console
        self._live = live
        self._began_s = clock.now_s()
        self._stages = dict.fromkeys(names, "")
        self._failed: set[str] = set()
        self._spinners: dict[str, Spinner] = {}

    def tell(self, name: str, stage: str, *, failed: bool = False) -> None:
        """That one is at this stage now."""
        if self._stages.get(name) == stage:
            return
        self._stages[name] = stage
        if failed:
            self._failed.add(name)
        if self._live is None:
            elapsed_s = clock.now_s() - self._began_s
            self._console.print(f"{elapsed_s:5.1f}s  {name}: {stage}", highlight=False, markup=False, soft_wrap=True)
        else:
            self._live.update(self._table())

    def of(self, name: str) -> Callable[[str], None]:
        """Tells of that one."""
        return partial(self.tell, name)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, stage in self._stages.items():
            spinner = self._spinners.setdefault(name, Spinner("dots"))
            mark = "[red]✗[/]" if name in self._failed else "[green]✓[/]" if stage.startswith(DONE) else spinner
            table.add_row(mark, name, f"[dim]{stage}[/]")
        table.add_row("", f"[dim]{clock.now_s() - self._began_s:.0f}s[/]", "")
        return table


@contextmanager
def progress(console: Console, names: Sequence[str]) -> Generator[Progress, None, None]:
    """For as long as the context is open."""
    if not console.is_terminal:
        yield Progress(console, names, None)
        return
    with Live(console=console, refresh_per_second=10) as live:
        yield Progress(console, names, live)
