"""The picture of the AgentX harness's runs: how many steps, and who waited for how long."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.agentx.harness import Found

COLOURS = {"ours": "#2f6fb3", "default": "#8db4dd", "sticky": "#8a8f98", "cache-aware": "#d9822b"}


def plot(found: Mapping[str, Sequence[Found]], path: Path) -> None:
    """Write the PNG: a bar for each arrangement, and a line for each run."""
    mpl.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans"})
    figure = Figure(figsize=(10.4, 4.0), layout="constrained", dpi=150)
    rates, waits = figure.subplots(1, 2)
    for name, runs in found.items():
        rate = 3600 * sum(run.steps for run in runs) / sum(run.seconds for run in runs)
        rates.text(name, rate, f"{rate:,.0f}", ha="center", va="bottom")
        rates.bar(name, rate, color=COLOURS[name], width=0.6)
        for number, run in enumerate(runs):
            shares = [(at + 1) / run.steps for at in range(run.steps)]
            label = name if number == 0 else None
            waits.step(sorted(run.ttft_s), shares, color=COLOURS[name], label=label, where="post", linewidth=1.4)
    rates.set_title("Steps an hour", loc="left")
    waits.set_title("Share of steps whose first token came within", loc="left")
    waits.set_xlabel("seconds")
    waits.set_xscale("log")
    waits.legend(frameon=False)
    for axes in (rates, waits):
        axes.set_ylim(bottom=0)
        axes.grid(color="#e3e5e8", linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle("AgentX on simulated accelerators", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(path)
