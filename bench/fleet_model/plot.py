"""The picture of a sweep."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sim.fleet.run import Figures

COLOURS = {
    "ours": "#2f6fb3",
    "sticky": "#d9822b",
    "offload": "#b3352f",
    "sticky_disk": "#e8b97f",
    "offload_disk": "#d99a97",
}
OTHERS = ("#4b8f5b", "#7a5fa8", "#8a8f98", "#3aa0a0", "#a08a3a")


def plot(figures: dict[tuple[str, float], Figures], bound: float, title: str, path: Path) -> None:
    """Write the PNG: traces, hits and waits over load, by contender. ``bound``: traces per worker-hour where nothing is
    computed twice."""
    mpl.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans"})
    figure = Figure(figsize=(11, 3.9), layout="constrained", dpi=150)
    traces, hits, waits = figure.subplots(1, 3)
    for axes, label in (
        (traces, "Traces per worker-hour"),
        (hits, "Share of prompts not computed"),
        (waits, "A step, s"),
    ):
        axes.set_title(label, loc="left")
        axes.set_xlabel("agents, as a multiple of what keeps the fleet busy")
        axes.grid(color="#e3e5e8", linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    names = list(dict.fromkeys(name for name, _ in figures))
    others = iter(OTHERS * len(names))
    for name in names:
        colour = COLOURS.get(name) or next(others)
        runs = sorted((load, one) for (other, load), one in figures.items() if other == name)
        _line(traces, [(load, one.traces_per_worker_h) for load, one in runs], colour, name)
        _line(hits, [(load, one.hits) for load, one in runs], colour, name)
        _line(waits, [(load, one.step_mean_s) for load, one in runs], colour, name)
    traces.axhline(bound, color="#55585e", linewidth=0.8, linestyle=":")
    traces.annotate(
        "nothing computed twice, full batches", (0.02, bound * 1.01), xycoords=("axes fraction", "data"), fontsize=7
    )
    traces.set_ylim(bottom=0)
    hits.set_ylim(0, 1)
    waits.set_yscale("log")
    figure.legend(*traces.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(path)


def _line(axes: Axes, points: list[tuple[float, float]], colour: str, name: str) -> None:
    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, linewidth=1.6, label=name)
