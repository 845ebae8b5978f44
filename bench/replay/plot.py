"""The picture of a replay."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bench.replay.records import Hits, StepRecord

BLUE, ORANGE, GREY, RED = "#2f6fb3", "#d9822b", "#8a8f98", "#b3352f"


def plot(records: Sequence[StepRecord], found: Hits | None, title: str, path: Path) -> None:
    """Write the PNG: first tokens, waits by share of steps, hits so far, steps at once. There must be a record."""
    mpl.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans"})
    figure = Figure(figsize=(10.4, 6.4), layout="constrained", dpi=150)
    grid = figure.subplots(2, 2)
    _first_tokens(grid[0][0], records)
    _shares(grid[0][1], records)
    _hits(grid[1][0], records, found)
    _at_once(grid[1][1], records)
    for row in grid:
        for axes in row:
            axes.grid(color="#e3e5e8", linewidth=0.7)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(path)


def _first_tokens(axes: Axes, records: Sequence[StepRecord]) -> None:
    first = [r for r in records if r.error is None and r.ttft_s is not None and r.index == 0]
    later = [r for r in records if r.error is None and r.ttft_s is not None and r.index > 0]
    failed = [r for r in records if r.error is not None]
    for of, colour, label in ((first, ORANGE, "a trace's first step"), (later, BLUE, "later steps")):
        if of:
            axes.scatter([r.sent_s for r in of], [r.ttft_s or 0.0 for r in of], s=12, color=colour, label=label)
    if failed:
        places = [max(1e-3, r.ended_s - r.sent_s) for r in failed]
        axes.scatter([r.sent_s for r in failed], places, s=18, color=RED, marker="x", label="failed")
    axes.set_yscale("log")
    axes.set_title("Time to first token", loc="left")
    axes.set_xlabel("sent, seconds since the start")
    axes.set_ylabel("seconds")
    axes.legend(frameon=False, fontsize=8)


def _shares(axes: Axes, records: Sequence[StepRecord]) -> None:
    good = [r for r in records if r.error is None]
    kinds = (
        ([r.ttft_s for r in good if r.ttft_s is not None], BLUE, "first token"),
        ([r.ended_s - r.sent_s for r in good], GREY, "whole step"),
        ([gap_s for r in good for gap_s in r.itl_s], ORANGE, "between tokens"),
    )
    for values, colour, label in kinds:
        if values:
            shares = [(i + 1) / len(values) for i in range(len(values))]
            axes.step(sorted(values), shares, color=colour, label=label, where="post")
    axes.set_xscale("log")
    axes.set_xlim(left=1e-3)
    axes.set_ylim(0, 1)
    axes.set_title("Share of steps that waited at most", loc="left")
    axes.set_xlabel("seconds")
    axes.legend(frameon=False, fontsize=8, loc="best")


def _hits(axes: Axes, records: Sequence[StepRecord], found: Hits | None) -> None:
    axes.set_title("Prompt tokens found in caches", loc="left")
    axes.set_xlabel("seconds since the start")
    axes.set_ylim(0, 1)
    known = sorted(
        (r for r in records if r.error is None and r.cached_tokens is not None and r.prompt_tokens),
        key=lambda r: r.ended_s,
    )
    if not known or found is None:
        axes.text(0.5, 0.5, "the server does not tell", transform=axes.transAxes, ha="center", color=GREY)
        return
    cached = accumulate(r.cached_tokens or 0 for r in known)
    prompts = accumulate(r.prompt_tokens or 0 for r in known)
    shares = [c / p for c, p in zip(cached, prompts, strict=True)]
    axes.plot([r.ended_s for r in known], shares, color=BLUE, label="delivered, so far")
    axes.axhline(found.shared, color=GREY, linestyle="--", linewidth=1, label="infinite shared cache, at the end")
    axes.axhline(
        found.session, color=ORANGE, linestyle=":", linewidth=1.3, label="infinite cache per trace, at the end"
    )
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _at_once(axes: Axes, records: Sequence[StepRecord]) -> None:
    changes = sorted([(r.sent_s, 1) for r in records] + [(r.ended_s, -1) for r in records])
    running = list(accumulate(change for _, change in changes))
    axes.step([at_s for at_s, _ in changes], running, color=BLUE, where="post", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Steps in progress", loc="left")
    axes.set_xlabel("seconds since the start")
