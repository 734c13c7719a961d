"""Are the curves drawn from whatever a run left, with the lines they are read against?"""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from behrt.history import Baselines
from behrt.plots import draw_curves

BASELINES = Baselines(6.9, 6.1, 0.04, floor_loss=3.4, floor_accuracy=0.3)


def curve(*values: float | None) -> list[dict]:
    return [{"epoch": epoch, "value": value} for epoch, value in enumerate(values, 1)]


HISTORIES = {
    "many epochs": {"train_loss": curve(*np.linspace(6, 4, 60)), "val_loss": curve(*np.linspace(6, 4.5, 60))},
    "one epoch": {"train_loss": curve(6.0), "val_loss": curve(6.1)},
    "none": {},
    "not finite": {"train_loss": curve(6.0, None), "val_loss": curve(6.1, None)},
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_picture_comes_of_any_history(tmp_path: Path, name: str) -> None:
    paths = draw_curves(HISTORIES[name], BASELINES, tmp_path, title=name)
    assert [path.name for path in paths] == ["loss_curve.png", "accuracy_curve.png"]
    for path in paths:
        assert imread(path).std() > 0.01
    assert len(list(tmp_path.iterdir())) == 2


def test_the_floor_is_drawn_in(tmp_path: Path) -> None:
    history = HISTORIES["many epochs"]
    drawn = [
        imread(draw_curves(history, baselines, tmp_path / str(number), title="a")[0])
        for number, baselines in enumerate((BASELINES, Baselines(6.9, 6.1, 0.04)))
    ]
    assert drawn[0].shape != drawn[1].shape or not np.array_equal(drawn[0], drawn[1])


def test_what_copying_reaches_is_drawn_in(tmp_path: Path) -> None:
    with_line = Baselines(6.9, 6.1, 0.04, copying_loss=5.6)
    drawn = [
        imread(draw_curves(HISTORIES["many epochs"], baselines, tmp_path / str(number), title="a")[0])
        for number, baselines in enumerate((with_line, Baselines(6.9, 6.1, 0.04)))
    ]
    assert drawn[0].shape != drawn[1].shape or not np.array_equal(drawn[0], drawn[1])


def test_no_figure_stays_open(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    draw_curves(HISTORIES["one epoch"], BASELINES, tmp_path, title="a")
    assert plt.get_fignums() == []
