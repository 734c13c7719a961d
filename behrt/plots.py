"""What does a run look like?

Figures for people, drawn with seaborn from the curves of one run or several, and the lines they are read against.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from behrt.doctor.curves import Curve
from behrt.files import replacing_file
from behrt.history import Baselines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.typing import LineStyleType

History = Mapping[str, Sequence[Mapping[str, Any]]]

REFERENCE_LINES: dict[str, tuple[str, str, LineStyleType]] = {
    "chance": ("chance", "0.55", ":"),
    "unigram": ("unigram", "0.35", "-."),
    "copying": ("with copying", "0.35", (0, (1, 1))),
    "prevalence": ("prevalence", "0.35", "-."),
    "floor": ("floor", "C2", "-"),
}
"""Label, colour and line style of each baseline."""

LABELS = {"loss": "loss (nats per scored token)", "accuracy": "accuracy"}

FIGURE_HEIGHT = 4.2
"""Inches."""

RUN_COLOURS = ("#0173b2", "#de8f05", "#cc78bc", "#d55e00", "#56b4e9", "#ca9161", "#000000", "#ece133")
"""Seaborn's colour-blind palette without the green and the grey of the reference lines."""

SPLITS: dict[str, tuple[str, LineStyleType]] = {"val": ("validation", "-"), "train": ("training", (0, (3, 2)))}
"""Label and line style of each split, where colours tell runs apart."""

CROSS: dict[str, Any] = {"marker": "x", "markersize": 8, "markeredgewidth": 2}

VERY_FEW_EPOCHS = 3
"""Beside other runs, a curve of no more than these has markers; on longer ones they would hide the dashes."""

MUCH_LONGER = 10
"""A run so many times as long as another leaves it no room, unless epochs are spaced by their logarithm."""

FAR_ABOVE = 1.5
"""A loss so many times as high as where any run began has exploded."""


def draw_curves(history: History, baselines: Baselines, folder: Path, *, title: str) -> list[Path]:
    """Writes `loss_curve.png` and `accuracy_curve.png` into `folder`; returns their paths."""
    loss_lines = {
        "chance": baselines.chance_loss,
        "unigram": baselines.unigram_loss,
        "copying": baselines.copying_loss,
        "prevalence": baselines.prevalence_loss,
        "floor": baselines.floor_loss,
    }
    accuracy_lines = {
        "unigram": baselines.unigram_accuracy,
        "prevalence": baselines.prevalence_accuracy,
        "floor": baselines.floor_accuracy,
    }
    return [
        _draw(history, "loss", loss_lines, folder / "loss_curve.png", title=title),
        _draw(history, "accuracy", accuracy_lines, folder / "accuracy_curve.png", title=title),
    ]


def _draw(history: History, figure_name: str, lines: Mapping[str, float | None], path: Path, *, title: str) -> Path:
    import pandas as pd
    import seaborn as sns

    label = LABELS[figure_name]
    rows = [
        {"epoch": point["epoch"], label: point["value"], "split": split}
        for split, key in (("training", f"train_{figure_name}"), ("validation", f"val_{figure_name}"))
        for point in history.get(key, ())
        if point["value"] is not None
    ]
    with saved_figure(path, width=8.4) as figure:
        axes = figure.add_subplot()
        if rows:
            frame = pd.DataFrame(rows)
            # a single epoch makes no line, so each epoch has a marker as long as there are few
            marker = "o" if frame["epoch"].nunique() <= 20 else None
            sns.lineplot(frame, x="epoch", y=label, hue="split", marker=marker, ax=axes)
        _finish(axes, figure_name, lines)
        axes.set_title(title)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(title=None, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # covers no curve
    return path


def draw_comparison(
    runs: Mapping[str, Mapping[str, Curve]], shared: Mapping[str, float], path: Path, *, title: str = ""
) -> Path:
    """Draws the curves of several runs together: loss, and accuracy where one is known.

    A cross is where a curve goes on with values that are not finite. Losses far above all first ones are cut off, for
    they would press every other curve flat.

    Args:
        runs: the curves of each run, by its name.
        shared: the lines that hold for all of them: `unigram_loss`, `floor_loss`, `unigram_accuracy`, `floor_accuracy`.

    Returns:
        `path`, which is replaced.
    """
    import seaborn as sns

    drawn = {
        figure_name: {name: _curves(curves, figure_name) for name, curves in runs.items()} for figure_name in LABELS
    }
    if not any(drawn["accuracy"].values()):
        del drawn["accuracy"]
    palette = RUN_COLOURS if len(runs) <= len(RUN_COLOURS) else sns.color_palette("husl", len(runs))
    colours = dict(zip(runs, palette, strict=False))
    handles = _legend(drawn, colours, shared)
    height = max(FIGURE_HEIGHT, 0.22 * sum(str(handle.get_label()).count("\n") + 1 for handle in handles))
    with saved_figure(path, width=3.2 + 4.2 * len(drawn), height=height) as figure:
        panels = figure.subplots(1, len(drawn), squeeze=False)[0]
        for axes, (figure_name, curves_of_run) in zip(panels, drawn.items(), strict=True):
            for name, curves in curves_of_run.items():
                for split, curve in curves.items():
                    _draw_curve(axes, curve, colour=colours[name], style=SPLITS[split][1])
            lines = {name: shared[key] for name in ("unigram", "floor") if (key := f"{name}_{figure_name}") in shared}
            _finish(axes, figure_name, lines)
            drawn_curves = [curve for curves in curves_of_run.values() for curve in curves.values()]
            _space_epochs(axes, drawn_curves)
            if figure_name == "loss":
                _cut_off(axes, drawn_curves, lines.values())
        figure.suptitle(title, fontsize="medium")
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return path


def _curves(curves: Mapping[str, Curve], figure_name: str) -> dict[str, Curve]:
    """The curves of one figure that have a finite value, by split."""
    found = {split: curves.get(f"{split}_{figure_name}") for split in SPLITS}
    return {split: curve for split, curve in found.items() if curve is not None and len(curve.finite)}


def _legend(
    drawn: Mapping[str, Mapping[str, Mapping[str, Curve]]], colours: Mapping[str, Any], shared: Mapping[str, float]
) -> list[Line2D]:
    """What stands for each run, for training and validation, for the crosses, and for the reference lines."""
    from matplotlib.lines import Line2D

    has_curve = {name: any(curves_of_run[name] for curves_of_run in drawn.values()) for name in colours}
    handles = [
        Line2D([], [], color=colour, label=_wrapped(name if has_curve[name] else f"{name} (no curve)"))
        for name, colour in colours.items()
    ]
    handles += [Line2D([], [], color="0.3", linestyle=style, label=label) for label, style in SPLITS.values()]
    curves = [curve for runs in drawn.values() for by_split in runs.values() for curve in by_split.values()]
    if any(len(_before_not_finite(curve)) for curve in curves):
        handles.append(Line2D([], [], color="0.3", linestyle="", **CROSS, label="not finite afterwards"))
    for name in ("unigram", "floor"):
        if values := [f"{shared[key]:.3f}" for figure_name in drawn if (key := f"{name}_{figure_name}") in shared]:
            label, colour, style = REFERENCE_LINES[name]
            handles.append(Line2D([], [], color=colour, linestyle=style, label=f"{label} {', accuracy '.join(values)}"))
    return handles


def _draw_curve(axes: Axes, curve: Curve, *, colour: Any, style: LineStyleType) -> None:
    import seaborn as sns

    points, lost = curve.finite, _before_not_finite(curve)
    marker = "o" if len(points) <= VERY_FEW_EPOCHS else None
    sns.lineplot(
        x=points.epochs, y=points.values, color=colour, linestyle=style, marker=marker, estimator=None, ax=axes
    )
    axes.plot(lost.epochs, lost.values, color=colour, linestyle="", **CROSS)


def _before_not_finite(curve: Curve) -> Curve:
    """The finite points that one follows which is not."""
    is_finite = np.isfinite(curve.values)
    return curve.where(is_finite & ~np.append(is_finite[1:], True))


def _space_epochs(axes: Axes, curves: Sequence[Curve]) -> None:
    """By their logarithm where a run is much longer than another; epochs from 0 have none."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    lasts = [curve.epochs[-1] for curve in curves]
    if curves and min(curve.epochs[0] for curve in curves) > 0 and max(lasts) > MUCH_LONGER * min(lasts):
        axes.set(xscale="log", xlabel="epoch (logarithmic)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _cut_off(axes: Axes, curves: Sequence[Curve], lines: Iterable[float]) -> None:
    """Leaves out what lies far above all first losses."""
    values = [curve.finite.values for curve in curves]
    top = FAR_ABOVE * max((loss[0] for loss in values), default=0)
    if any(loss.max() > top for loss in values):
        bottom = min([loss.min() for loss in values] + list(lines))
        axes.set_ylim(bottom - 0.05 * (top - bottom), top)


@contextmanager
def saved_figure(path: Path, *, width: float, height: float = FIGURE_HEIGHT) -> Iterator[Figure]:
    """A figure of seaborn's style, so many inches wide and high, that becomes the file `path`."""
    import matplotlib.pyplot as plt
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with sns.axes_style("whitegrid"), plt.rc_context({"figure.dpi": 120}):
        figure = Figure(figsize=(width, height), layout="constrained")  # not pyplot's: no global state, no open window
        FigureCanvasAgg(figure)
        yield figure
        with replacing_file(path) as beside:
            figure.savefig(beside, format="png")


def _finish(axes: Axes, figure_name: str, lines: Mapping[str, float | None]) -> None:
    """The reference lines, and what the axes are called and begin with."""
    from matplotlib.ticker import MaxNLocator

    for name, value in lines.items():
        if value is not None and math.isfinite(value):
            label, colour, style = REFERENCE_LINES[name]
            axes.axhline(value, color=colour, linestyle=style, linewidth=1.2, label=f"{label} {value:.3f}")
    label = LABELS[figure_name]
    if lines.get("prevalence") is not None:  # of a task, where it is labels that are scored
        label = label.replace("scored token", "label")
    axes.set(xlabel="epoch", ylabel=label)
    if figure_name == "accuracy":
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _wrapped(name: str) -> str:
    """A name as a legend shows it: in lines of a bearable length, and never as a formula."""
    return textwrap.fill(name, 30).replace("$", r"\$")
