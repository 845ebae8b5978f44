"""The picture of the failover bench: every read as a point, by when it began and how long it took."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.faults.failover_process import Round

BLUE, ORANGE, GREY, RED = "#2f6fb3", "#d9822b", "#8a8f98", "#b3352f"
LIMIT_MS = 300.0
TITLES = {"kill": "A node is killed", "freeze": "A node is frozen"}


def plot(rounds: Sequence[Round], path: Path) -> None:
    """Write the PNG: a panel per kind of event, all its rounds on top of each other, the event at 0."""
    mpl.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    events = list(dict.fromkeys(part.event for part in rounds))
    figure = Figure(figsize=(9.6, 3.4 * len(events)), layout="constrained", dpi=150)
    grid = figure.subplots(len(events), 1, squeeze=False, sharex=True, sharey=True)
    for row, event in enumerate(events):
        of = [part for part in rounds if part.event == event]
        axes: Axes = grid[row][0]
        _panel(axes, of)
        axes.set_title(f"{TITLES[event]} ({len(of)} rounds)", loc="left", fontweight="bold")
        axes.set_ylabel("a read takes, ms")
        if row == len(events) - 1:
            axes.set_xlabel("seconds since it happened")
    figure.suptitle("Reads of 16 blocks from two store nodes", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(path)


def _panel(axes: Axes, rounds: Sequence[Round]) -> None:
    kinds: dict[str, tuple[list[float], list[float]]] = {}
    for part in rounds:
        for reads in part.readers:
            for start_s, seconds, missed, kind in reads:
                name = f"{kind} missed" if missed else kind
                xs, ys = kinds.setdefault(name, ([], []))
                xs.append(start_s - part.at_s)
                ys.append(1e3 * seconds)
    styles = {
        "lone": (GREY, ".", "one copy: read"),
        "pinned": (BLUE, ".", "two copies: read"),
        "lone missed": (ORANGE, "x", "one copy: miss"),
        "pinned missed": (RED, "D", "two copies: failed"),
    }
    for name, (colour, marker, label) in styles.items():
        if name in kinds:
            axes.scatter(*kinds[name], s=14, color=colour, marker=marker, label=label, linewidths=0.8, alpha=0.7)
    axes.axvline(0, color="#333333", linewidth=1)
    axes.axhline(LIMIT_MS, color=RED, linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylim(0.1, 5000)  # room for the legend
    axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, loc="upper right", ncols=4)
