"""The picture of the replays over vLLM: how far each arrangement was at each second, and who waited for how long."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.replay.run import Outcome

COLOURS = {"ours": "#2f6fb3", "lmcache": "#d9822b", "sticky": "#8a8f98", "ample": "#3f8f5b"}


def plot(outcomes: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """Write the PNG: a line for each run, in its arrangement's colour."""
    mpl.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans"})
    figure = Figure(figsize=(10.4, 4.0), layout="constrained", dpi=150)
    done, waits = figure.subplots(1, 2)
    for name, runs in outcomes.items():
        for number, outcome in enumerate(runs):
            good = [record for record in outcome.records if record.error is None]
            ends = sorted(record.ended_s for record in good)
            first = sorted(record.ttft_s for record in good if record.ttft_s is not None)
            style = {"color": COLOURS[name], "label": name if number == 0 else None, "where": "post", "linewidth": 1.4}
            done.step(ends, range(1, len(ends) + 1), **style)
            waits.step(first, [(at + 1) / len(first) for at in range(len(first))], **style)
    done.set_title("Steps done", loc="left")
    done.set_xlabel("seconds since the start")
    waits.set_title("Share of steps whose first token came within", loc="left")
    waits.set_xlabel("seconds")
    waits.set_xscale("log")
    for axes in (done, waits):
        axes.set_ylim(bottom=0)
        axes.grid(color="#e3e5e8", linewidth=0.7)
        axes.legend(frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle("Recorded agents over vLLM", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.savefig(path)
