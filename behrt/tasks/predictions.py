"""How are predictions handed to other programs?

In the layout that `meds-evaluation` reads: `subject_id`, `prediction_time`, `boolean_value` (the label),
`predicted_boolean_value` and `predicted_boolean_probability`; a file a label, since it knows binary tasks only.
Survival, for which it has no layout, keeps the label's own columns, with the risk as `predicted_float_value`. Rows of
which a label is not known are left out. The files name patients, and are readable by their owner only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from behrt.files import replacing_file
from behrt.tasks.examples import Examples


def write_predictions(
    folder: Path, examples: Examples, scores: NDArray[Any], thresholds: NDArray[np.float64] | None = None
) -> list[Path]:
    """Writes the predictions of one predictor; the paths.

    Args:
        folder: gets `predictions.parquet`, or of several labels a file with the name of each.
        scores: probabilities [rows, names]; of survival, risks [rows].
        thresholds: at which a label is predicted, [names].
    """
    about = {"subject_id": examples.subjects, "prediction_time": examples.times}
    if examples.kind == "survival":
        assert examples.days is not None
        table = pl.DataFrame(
            {
                **about,
                "boolean_value": examples.seen_events,
                "float_value": examples.days,
                "predicted_float_value": scores.astype(np.float64),
            }
        )
        return [_write(folder / "predictions.parquet", table)]
    assert thresholds is not None
    paths = []
    names = ["predictions"] if len(examples.names) == 1 else file_names(examples.names)
    for number, name in enumerate(names):
        own = scores[:, number].astype(np.float64)
        table = pl.DataFrame(
            {
                **about,
                "boolean_value": examples.targets[:, number] > 0,
                "predicted_boolean_value": own >= thresholds[number],
                "predicted_boolean_probability": own,
            }
        ).filter(~np.isnan(examples.targets[:, number]))
        paths.append(_write(folder / f"{name}.parquet", table))
    return paths


def file_names(names: Sequence[str]) -> list[str]:
    """Labels as names of files, all different.

    >>> file_names(["heart failure", "heart/failure", "COPD"])
    ['heart_failure', 'heart_failure_2', 'COPD']
    """
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w-]+", "_", name)[:100] or "label"
        candidates = (plain if number == 1 else f"{plain}_{number}" for number in range(1, len(names) + 1))
        found.append(next(candidate for candidate in candidates if candidate.lower() not in map(str.lower, found)))
    return found


def _write(path: Path, table: pl.DataFrame) -> Path:
    with replacing_file(path) as beside:
        beside.touch(mode=0o600)
        table.write_parquet(beside)
    return path
