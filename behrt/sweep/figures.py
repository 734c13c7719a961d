"""What does a study look like?

Its history, the curves of its trials, which parameter matters, and how the parameters go together with the objective.
A figure that needs more trials than there are is left out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from behrt.history import Baselines, read_history, read_run
from behrt.plots import FAR_ABOVE, draw_curves, saved_figure
from behrt.sweep.settings import Sweep
from behrt.sweep.space import CategoricalParameter, IntParameter
from behrt.sweep.trials import TrialRecord, TrialState, best_trial

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

STATE_COLOURS = {"COMPLETE": "#0173b2", "PRUNED": "#de8f05", "FAILED": "#d55e00"}
LABELS = {"val_loss": "best val_loss (nats per scored token)", "val_accuracy": "val_accuracy"}
FEWEST_FOR_IMPORTANCE = 5


def draw_study(records: Sequence[TrialRecord], sweep: Sweep, folder: Path) -> list[Path]:
    """Writes the figures of a study as PNG files into `folder`; their paths."""
    import pandas as pd

    frame = pd.DataFrame(
        [
            {"trial": record.number, "state": record.state.value, LABELS[sweep.objective]: record.best, **record.params}
            for record in records
            if record.best is not None and math.isfinite(record.best) and record.state.value in STATE_COLOURS
        ]
    )
    drawers: dict[str, Callable[[Path], bool]] = {
        "history": lambda path: _history(frame, records, sweep, path),
        "intermediate_values": lambda path: _curves(records, sweep, path),
        "importances": lambda path: _importances(records, sweep, path),
        "slice": lambda path: _slice(frame, records, sweep, path),
        "parallel_coordinates": lambda path: _parallel(frame, sweep, path),
        "pair": lambda path: _pair(frame, records, sweep, path),
    }
    drawn = []
    for name, draw in drawers.items():
        path = folder / f"{name}.png"
        if not frame.empty and draw(path):
            drawn.append(path)
        else:
            path.unlink(missing_ok=True)
    return drawn


def draw_trial(record: TrialRecord, study: str) -> Path | None:
    """Writes the curves of a trial that has ended; their folder, or None where there is nothing new to draw.

    Its worker leaves them undrawn: that would take longer than everything else around a short trial.

    Raises:
        UserError: the trial's folder is damaged.
    """
    folder = None if record.folder is None else Path(record.folder)
    if folder is None or not (folder / "run.json").exists():  # on another machine, or it never began
        return None
    plots, history = folder / "plots", folder / "logs" / "metrics_history.json"
    curve = plots / "loss_curve.png"
    if not history.exists() or (curve.exists() and curve.stat().st_mtime >= history.stat().st_mtime):
        return None
    baselines = Baselines(**read_run(folder)["baselines"])
    draw_curves(read_history(folder), baselines, plots, title=f"{study}, trial {record.number}")
    return plots


def _is_log(sweep: Sweep, name: str) -> bool:
    parameter = sweep.space[name]
    return not isinstance(parameter, CategoricalParameter) and parameter.log


def _scale(axes: Axes, sweep: Sweep, *, x: str | None = None, y: str | None = None) -> None:
    """Scales the axes as their parameters are drawn, from bound to bound, with few and plain numbers on them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name, axis, set_scale, set_limits in (
        (x, axes.xaxis, axes.set_xscale, axes.set_xlim),
        (y, axes.yaxis, axes.set_yscale, axes.set_ylim),
    ):
        parameter = None if name is None else sweep.space[name]
        if parameter is None or isinstance(parameter, CategoricalParameter):
            continue
        low, high = float(parameter.low), float(parameter.high)
        if not parameter.log:
            set_limits(low - 0.06 * (high - low), high + 0.06 * (high - low))
            continue
        set_scale("log")
        margin = (high / low) ** 0.06
        set_limits(low / margin, high * margin)
        # of less than two decades the powers of ten alone would be one label, or none
        if isinstance(parameter, IntParameter) and high < 100 * low:
            axis.set_major_locator(LogLocator(base=2, numticks=6))
        else:
            axis.set_major_locator(LogLocator(base=10, subs=(1, 3) if high < 100 * low else (1,), numticks=6))
        axis.set_major_formatter(FuncFormatter(_plain_number))
        axis.set_minor_formatter(NullFormatter())


def _plain_number(value: float, position: int | None = None) -> str:
    """A number on an axis.

    >>> _plain_number(0.0003), _plain_number(0.03), _plain_number(16.0)
    ('3e-4', '0.03', '16')
    """
    return f"{value:.0e}".replace("e-0", "e-") if value < 0.005 else f"{value:g}"


def _bound(records: Sequence[TrialRecord], sweep: Sweep) -> float:
    """A loss above this one has exploded: half as high again as where the trials began."""
    first = [record.values[min(record.values)] for record in records if record.values]
    first = [value for value in first if math.isfinite(value)]
    return FAR_ABOVE * statistics.median(first) if first and sweep.direction == "minimize" else math.inf


def _cut_off(axes: Axes, records: Sequence[TrialRecord], sweep: Sweep) -> None:
    """Leaves out losses that have exploded, which would press all others flat, and says so."""
    bound, (bottom, top) = _bound(records, sweep), axes.get_ylim()
    if top > bound > bottom:
        kept = [value for record in records for value in record.values.values() if value <= bound]
        axes.set_ylim(min(kept) - 0.05 * (bound - min(kept)), bound)
        axes.annotate(
            f"above {bound:.1f} left out",
            (0.99, 0.98),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize="small",
        )


def _searched(frame: pd.DataFrame, sweep: Sweep) -> list[str]:
    return [name for name in sweep.space if name in frame]


def _history(frame: pd.DataFrame, records: Sequence[TrialRecord], sweep: Sweep, path: Path) -> bool:
    import seaborn as sns
    from matplotlib.ticker import MaxNLocator

    label = LABELS[sweep.objective]
    complete = frame[frame["state"] == "COMPLETE"]
    best = complete[label].cummin() if sweep.direction == "minimize" else complete[label].cummax()
    with saved_figure(path, width=8.4) as figure:
        axes = figure.add_subplot()
        sns.scatterplot(frame, x="trial", y=label, hue="state", palette=STATE_COLOURS, ax=axes)
        if len(complete):
            until = [*complete["trial"], frame["trial"].max()]
            axes.step(until, [*best, best.iloc[-1]], where="post", color="0.3", linewidth=1.2, label="best so far")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _cut_off(axes, records, sweep)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        axes.set_title(sweep.name)
    return True


def _curves(records: Sequence[TrialRecord], sweep: Sweep, path: Path) -> bool:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    best = best_trial(records, sweep.direction)
    with saved_figure(path, width=8.4) as figure:
        axes = figure.add_subplot()
        for record in records:
            values = {epoch: value for epoch, value in record.values.items() if math.isfinite(value)}
            colour = STATE_COLOURS.get(record.state.value, "0.6")
            is_best = best is not None and record.number == best.number
            width, alpha, order = (2.4, 1.0, 3) if is_best else (1.0, 0.6, 2)
            axes.plot(list(values), list(values.values()), color=colour, alpha=alpha, linewidth=width, zorder=order)
            if values:
                axes.plot([max(values)], [values[max(values)]], color=colour, marker="o", markersize=3)
        axes.set(xlabel="epoch", ylabel=f"{sweep.objective} of the epoch", title=sweep.name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        states = {record.state.value for record in records if record.values}
        handles = [
            Line2D([], [], color=colour, label=state) for state, colour in STATE_COLOURS.items() if state in states
        ]
        if best is not None:
            handles.append(
                Line2D([], [], color=STATE_COLOURS["COMPLETE"], linewidth=2.4, label=f"best: trial {best.number}")
            )
        axes.set_xlim(left=1 - 0.02 * max(record.epochs for record in records))
        _cut_off(axes, records, sweep)
        axes.legend(handles=handles, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return True


def _importances(records: Sequence[TrialRecord], sweep: Sweep, path: Path) -> bool:
    """By PED-ANOVA (Watanabe et al., 2023): what tells the better trials from all, complete ones alone."""
    import optuna

    from behrt.sweep.space import distribution

    study = optuna.create_study(direction=sweep.direction)
    complete = [record for record in records if record.state is TrialState.COMPLETE and record.best is not None]
    names = [name for name in sweep.space if len({record.params.get(name) for record in complete} - {None}) > 1]
    complete = [record for record in complete if all(name in record.params for name in names)]
    if len(complete) < FEWEST_FOR_IMPORTANCE or len(names) < 2:
        return False
    for record in complete:
        study.add_trial(
            optuna.create_trial(
                params={name: record.params[name] for name in names},
                distributions={name: distribution(sweep.space[name]) for name in names},
                value=record.best,
            )
        )
    try:
        found = optuna.importance.get_param_importances(study)
    except (ValueError, RuntimeError):  # too few trials that differ
        return False
    with saved_figure(path, width=6.0, height=1.2 + 0.4 * len(found)) as figure:
        axes = figure.add_subplot()
        axes.barh(list(found), list(found.values()), color=STATE_COLOURS["COMPLETE"])
        axes.invert_yaxis()
        axes.set(xlabel=f"importance for {sweep.objective}", title=f"{sweep.name}, {len(complete)} complete trials")
    return True


def _slice(frame: pd.DataFrame, records: Sequence[TrialRecord], sweep: Sweep, path: Path) -> bool:
    import seaborn as sns

    label, names = LABELS[sweep.objective], _searched(frame, sweep)
    if not names:
        return False
    with saved_figure(path, width=3.0 * len(names) + 1.4) as figure:
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            shown = frame.dropna(subset=[name])
            if isinstance(sweep.space[name], CategoricalParameter):
                shown = shown.assign(**{name: shown[name].astype(str)})
            sns.scatterplot(
                shown, x=name, y=label, hue="state", palette=STATE_COLOURS, ax=axes, legend=axes is panels[-1]
            )
            _scale(axes, sweep, x=name)
            if isinstance(sweep.space[name], CategoricalParameter):
                axes.tick_params(axis="x", labelrotation=30)
        _cut_off(panels[0], records, sweep)
        if panels[-1].get_legend() is not None:
            panels[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        figure.suptitle(sweep.name, fontsize="medium")
    return True


def _place(value: Any, sweep: Sweep, name: str) -> float:
    """Where a value lies between the bounds of its parameter, from 0 to 1."""
    parameter = sweep.space[name]
    if isinstance(parameter, CategoricalParameter):
        return parameter.choices.index(value) / max(1, len(parameter.choices) - 1)
    low, high, at = (float(number) for number in (parameter.low, parameter.high, value))
    if parameter.log:
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low)


def _parallel(frame: pd.DataFrame, sweep: Sweep, path: Path) -> bool:
    import matplotlib as mpl
    from matplotlib.colors import Normalize

    label, names = LABELS[sweep.objective], _searched(frame, sweep)
    all_complete = frame[frame["state"] == "COMPLETE"]
    complete = all_complete.dropna(subset=names)
    left_out = len(all_complete) - len(complete)
    note = f" ({left_out} without all of these settings left out)" if left_out else ""
    if len(complete) < 2 or len(names) < 2:
        return False
    colours = mpl.colormaps["viridis" if sweep.direction == "minimize" else "viridis_r"]
    scale = Normalize(complete[label].min(), complete[label].max())
    with saved_figure(path, width=8.4) as figure:
        axes = figure.add_subplot()
        # the best ones last, and so on top
        for _, row in complete.sort_values(label, ascending=sweep.direction == "maximize").iterrows():
            heights = [_place(row[name], sweep, name) for name in names]
            axes.plot(range(len(names)), heights, color=colours(scale(row[label])), linewidth=1.2)
        for at, name in enumerate(names):
            parameter = sweep.space[name]
            ends = (
                (parameter.choices[0], parameter.choices[-1])
                if isinstance(parameter, CategoricalParameter)
                else (f"{parameter.low:g}", f"{parameter.high:g}")
            )
            for height, text, side in ((-0.04, ends[0], "top"), (1.04, ends[1], "bottom")):
                axes.text(at, height, str(text), ha="center", va=side, fontsize="small")
        axes.set(ylim=(-0.15, 1.15), yticks=[], title=f"{sweep.name}, complete trials{note}")
        axes.set_xticks(range(len(names)), names)
        figure.colorbar(mpl.cm.ScalarMappable(norm=scale, cmap=colours), ax=axes, label=label)
    return True


def _pair(frame: pd.DataFrame, records: Sequence[TrialRecord], sweep: Sweep, path: Path) -> bool:
    """Every parameter against every other one, coloured by the objective."""
    import seaborn as sns

    label = LABELS[sweep.objective]
    names = [name for name in _searched(frame, sweep) if not isinstance(sweep.space[name], CategoricalParameter)]
    if len(names) < 2 or len(frame) < 2:
        return False
    size = 2.1 * len(names)
    bound = _bound(records, sweep)
    shown = frame.assign(**{label: frame[label].clip(upper=bound).round(3)})  # one that exploded takes all colours
    with saved_figure(path, width=size + 1.6, height=size) as figure:
        grid = figure.subplots(len(names), len(names), squeeze=False)
        for row, y in enumerate(names):
            for column, x in enumerate(names):
                axes = grid[row][column]
                if row == column:
                    sns.histplot(frame, x=x, bins=10, log_scale=_is_log(sweep, x), color="0.7", ax=axes)
                    axes.set_ylabel("trials")
                else:
                    sns.scatterplot(
                        shown, x=x, y=y, hue=label, style="state", palette="viridis", s=22, ax=axes,
                        legend=row == 0 and column == len(names) - 1,
                    )  # fmt: skip
                    _scale(axes, sweep, y=y)
                    axes.set_ylabel(y if column == 0 else "")
                _scale(axes, sweep, x=x)
                axes.set_xlabel(x if row == len(names) - 1 else "")
                is_inside = column > 0 and row != column
                axes.tick_params(labelsize="x-small", labelleft=not is_inside, labelbottom=row == len(names) - 1)
        legend = grid[0][-1].get_legend()
        if legend is not None:
            grid[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
        figure.suptitle(sweep.name, fontsize="medium")
    return True
