"""The picture of the engine's bench: our speed divided by vLLM's."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.common.report import Result

BLUE, ORANGE, GREY = "#2f6fb3", "#d9822b", "#8a8f98"


def plot(results: Sequence[Result], path: Path) -> None:
    """Write the PNG: a bar for each measurement that has a ratio to vLLM."""
    bars = [r for r in results if r.versus == "vllm" and r.ratio is not None]
    assert bars, "nothing was measured beside vLLM"
    mpl.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    figure = Figure(figsize=(8.4, 0.34 * len(bars) + 1.4), layout="constrained", dpi=150)
    axes = figure.subplots()
    places = list(range(len(bars)))[::-1]
    ratios = [r.ratio or 0.0 for r in bars]
    axes.barh(places, ratios, color=[BLUE if ratio >= 1 else ORANGE for ratio in ratios], height=0.68)
    axes.axvline(1.0, color=GREY, linewidth=1.2)
    for place, bar, ratio in zip(places, bars, ratios, strict=True):
        value = "" if bar.unit == "ratio" else f"  {bar.value:.4g} {bar.unit}"
        axes.text(ratio, place, f" {ratio:.2f}{value}", va="center", fontsize=8.5)
    axes.set_yticks(places, [bar.name.removeprefix("engine.") for bar in bars])
    axes.set_xlim(0, max(1.0, *ratios) * 1.35)  # room for the figures
    axes.set_xlabel("speed divided by vLLM's")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.suptitle("Engine: SmolLM2-135M, bfloat16, 2 threads", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(path)
