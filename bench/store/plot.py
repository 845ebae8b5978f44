"""The picture of the store's bench: GB/s by block size, the store beside what its bytes cost anyway."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.common.report import Result

SIZES = ("64K", "256K", "1M", "4M")
COLUMNS = (("host", "Same host"), ("tcp", "TCP"))
BLUE, ORANGE, GREY, GREEN = "#2f6fb3", "#d9822b", "#8a8f98", "#4c9a6a"


def plot(results: Sequence[Result], path: Path) -> None:
    """Write the PNG: a panel per place (same host, TCP) and number of clients that was measured."""
    values = {result.name: result.value for result in results}
    columns = [(key, title) for key, title in COLUMNS if f"store.get.{key}.1M" in values]
    assert columns, "nothing that moves bytes was measured"
    mpl.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    figure = Figure(figsize=(5.6 * len(columns), 7.4), layout="constrained", dpi=150)
    grid = figure.subplots(2, len(columns), squeeze=False)
    for column, (key, title) in enumerate(columns):
        top = max(max(line[1]) for count in (1, 2) for line in _lines(values, key, count))
        for row, count in enumerate((1, 2)):
            axes: Axes = grid[row][column]
            _panel(axes, _lines(values, key, count))
            axes.set_title(f"{title}, {count} client{'s' if count > 1 else ''}", loc="left", fontweight="bold")
            axes.set_ylim(0, top * 1.3)  # room for the legend
            if column == 0:
                axes.set_ylabel("GB/s")
            if row == 1:
                axes.set_xlabel("block size")
    figure.suptitle("KV store: batches of 64 MiB, checksums on", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(path)


Line = tuple[str, list[float], str, str]
"""Label, GB/s by size, colour, style."""


def _lines(values: dict[str, float], key: str, count: int) -> list[Line]:
    suffix = "" if count == 1 else f".x{count}"
    named = [
        ("memcpy", "memcpy.{}", GREY, "--"),
        ("raw TCP, to the client", "tcp.raw.get.{}", GREY, "--"),
        ("raw TCP, from the client", "tcp.raw.put.{}", GREY, ":"),
        ("Mooncake get", "tcp.mooncake.get.{}", GREEN, "--"),
        ("Mooncake put", "tcp.mooncake.put.{}", GREEN, ":"),
        ("store get", f"store.get.{key}.{{}}", BLUE, "-"),
        ("store put", f"store.put.{key}.{{}}", ORANGE, "-"),
    ]
    lines: list[Line] = []
    for label, name, colour, style in named:
        if name.startswith("tcp.") != (key == "tcp") and not name.startswith("store."):
            continue
        points = [values.get(name.format(size) + suffix) for size in SIZES]
        if None not in points:
            lines.append((label, [point for point in points if point is not None], colour, style))
    return lines


def _panel(axes: Axes, lines: list[Line]) -> None:
    places = list(range(len(SIZES)))
    for label, points, colour, style in lines:
        axes.plot(places, points, style, color=colour, marker="o", markersize=5, linewidth=2, label=label)
    ours = [line for line in lines if line[3] == "-"]
    for place in places:
        ranked = sorted(ours, key=lambda line: line[1][place])
        for line, offset in zip(ranked, (-14, 7), strict=True):
            point = line[1][place]
            axes.annotate(
                f"{point:.1f}" if point >= 1 else f"{point:.2f}",
                (place, point),
                xytext=(0, offset),
                textcoords="offset points",
                ha="center",
                color=line[2],
            )
    axes.set_xticks(places, [f"{size[:-1]} {size[-1]}iB" for size in SIZES])
    axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.margins(x=0.08)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", ncols=2)
