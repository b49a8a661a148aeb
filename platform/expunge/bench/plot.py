"""Pareto plots: what is left of the targets, against what happened to everything else."""

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from expunge.bench.arms import ARMS
from expunge.bench.summary import Mean, Row

PANELS: Sequence[tuple[str, Callable[[Row], Mean | None]]] = (
    ("median PSNR of unrelated outputs, dB", lambda row: row.psnr),
    ("PSNR of the outputs most like a target, worst tenth, dB", lambda row: row.collateral),
)
MARKERS = "osD^v<>Pp*hXd8H1234"
HIGHEST = 60.0
"""dB: an unchanged model would be at infinity, or near 100."""


def pareto(rows: Sequence[Row], title: str, kind: Literal["svg", "png"]) -> bytes:
    """Draw each arm as a point with its intervals in every panel; better is up and to the left.

    An arm without a figure is left out of its panel, and a PSNR above HIGHEST is drawn there.
    """
    with rc_context({"svg.hashsalt": "expunge", "svg.fonttype": "none", "font.size": 8, "font.family": "sans-serif"}):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        axes = figure.subplots(1, len(PANELS))
        for panel, (label, figure_of) in zip(axes, PANELS, strict=True):
            _draw(panel, rows, figure_of)
            panel.set_ylabel(label)
            panel.set_xlabel("excess reproduction left (1: as in the base model)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        figure.suptitle(title, x=0.01, ha="left")
        buffer = BytesIO()
        figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else {})
    return buffer.getvalue()


def _draw(axes: Axes, rows: Sequence[Row], figure_of: Callable[[Row], Mean | None]) -> None:
    for row, marker in zip(rows, MARKERS, strict=False):
        left, kept = row.left, figure_of(row)
        if left is None or kept is None:
            continue
        axes.errorbar(
            left.value,
            min(kept.value, HIGHEST),
            xerr=_bars(left),
            yerr=_bars(kept) if kept.value < HIGHEST else None,
            marker=marker,
            linestyle="none",
            markersize=7 if row.arm == "ours" else 5,
            elinewidth=0.7,
            label=ARMS[row.arm].title,
        )
    axes.axvline(1.0, color="#808080", linewidth=0.6, linestyle=":")
    axes.grid(visible=True, color="#808080", alpha=0.18, linewidth=0.6)


def _bars(mean: Mean) -> list[list[float]] | None:
    """Return how far the interval reaches below and above, as matplotlib takes it."""
    if mean.interval is None:
        return None
    low, high = mean.interval
    return [[max(0.0, mean.value - low)], [max(0.0, high - mean.value)]]
