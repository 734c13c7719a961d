"""What does a run look like?

Figures for people, drawn with seaborn from a run's history and baselines alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from behrt.files import replacing_file
from behrt.history import Baselines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = Mapping[str, Sequence[Mapping[str, Any]]]

REFERENCE_LINES = {
    "chance": ("chance", "0.55", ":"),
    "unigram": ("unigram", "0.35", "--"),
    "floor": ("floor", "C2", "-"),
}
"""Label, colour and line style of each baseline."""


def draw_curves(history: History, baselines: Baselines, folder: Path, *, title: str) -> list[Path]:
    """Writes `loss_curve.png` and `accuracy_curve.png` into `folder`; returns their paths."""
    loss_lines = {"chance": baselines.chance_loss, "unigram": baselines.unigram_loss, "floor": baselines.floor_loss}
    accuracy_lines = {"unigram": baselines.unigram_accuracy, "floor": baselines.floor_accuracy}
    return [
        _draw(
            history, "loss", loss_lines, folder / "loss_curve.png", title=title, label="loss (nats per scored token)"
        ),
        _draw(history, "accuracy", accuracy_lines, folder / "accuracy_curve.png", title=title, label="accuracy"),
    ]


def _draw(
    history: History, figure_name: str, lines: Mapping[str, float | None], path: Path, *, title: str, label: str
) -> Path:
    import matplotlib.pyplot as plt
    import pandas as pd
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = [
        {"epoch": point["epoch"], label: point["value"], "split": split}
        for split, key in (("training", f"train_{figure_name}"), ("validation", f"val_{figure_name}"))
        for point in history.get(key, ())
        if point["value"] is not None
    ]
    with sns.axes_style("whitegrid"), plt.rc_context({"figure.dpi": 120}):
        figure = Figure(figsize=(8.4, 4.2), layout="constrained")  # not pyplot's: no global state, no open window
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if rows:
            frame = pd.DataFrame(rows)
            # a single epoch makes no line, so each epoch has a marker as long as there are few
            marker = "o" if frame["epoch"].nunique() <= 20 else None
            sns.lineplot(frame, x="epoch", y=label, hue="split", marker=marker, ax=axes)
        for name, value in lines.items():
            if value is not None and math.isfinite(value):
                _reference_line(axes, name, value)
        axes.set(xlabel="epoch", ylabel=label, title=title)
        if figure_name == "accuracy":
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(title=None, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # covers no curve
        with replacing_file(path) as beside:
            figure.savefig(beside, format="png")
    return path


def _reference_line(axes: Axes, name: str, value: float) -> None:
    label, colour, style = REFERENCE_LINES[name]
    axes.axhline(value, color=colour, linestyle=style, linewidth=1.2, label=f"{label} {value:.3f}")
