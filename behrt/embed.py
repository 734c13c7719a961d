"""How do patients become a table of vectors for other tools?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from behrt.checkpoints import read_about
from behrt.config import UserError
from behrt.events import SPLITS
from behrt.files import replacing_file
from behrt.labels import KINDS
from behrt.runs import checkpoint_folder
from behrt.sequences import open_prepared
from behrt.tasks.examples import PREDICTED, last_moments, read_examples
from behrt.tasks.finetuned import embed


def write_embeddings(
    run: str,
    data_folder: Path,
    out: Path,
    *,
    labels: Path | None = None,
    gap: float | None = None,
    splits: Sequence[str] = (),
    device: torch.device,
) -> dict[str, Any]:
    """Writes `subject_id`, `prediction_time` and `embedding` (list<float32>), readable by the owner only.

    Args:
        labels: whose prediction times count, of any kind; None is the end of each patient's record.
        gap: days before these that are hidden; None is what a fine-tuned run was trained with, and else 0.
        splits: of the patients; none is all of them.

    Returns:
        `rows`, `width`, and of a label file the `dropped` rows.

    Raises:
        UserError: no such run, records or labels; no patient to write.
    """
    if gap is None:
        task = read_about(checkpoint_folder(run)).task
        gap = 0.0 if labels is None or task is None else float(task["gap"])
    if not 0 <= gap < 1e5:
        raise UserError(f"--gap: {gap:g}: expected days, from 0 on")
    data = open_prepared(data_folder)
    asked = tuple(splits) or SPLITS
    dropped: dict[str, int] = {}
    for name in asked:
        data.split(name).check(len(data.vocabulary))
    if labels is None:
        parts = [last_moments(data.split(name)) for name in asked]
    else:
        found = read_examples(labels, data, gap=gap, splits=asked, kinds=(*PREDICTED, *sorted(set(KINDS.values()))))
        parts = [found[name] for name in asked]
        dropped = {name: count for name, count in found.counts.items() if name != "rows"}
    parts = [part for part in parts if len(part)]
    if not parts:
        raise UserError(f"--data: {data_folder}: no patients in {' and '.join(asked)}; nothing to write")
    vectors = [embed(run, part, data, device=device) for part in parts]
    together = np.concatenate(vectors)
    width = together.shape[1]
    offsets = pa.array(np.arange(len(together) + 1, dtype=np.int64) * width)
    table = pa.table(
        {
            "subject_id": np.concatenate([part.subjects for part in parts]),
            "prediction_time": pa.array(np.concatenate([part.times for part in parts]), pa.timestamp("us")),
            "embedding": pa.LargeListArray.from_arrays(offsets, pa.array(together.reshape(-1), pa.float32())),
        }
    )
    with replacing_file(out) as beside:
        beside.touch(mode=0o600)
        pq.write_table(table, beside)
    return {"rows": len(together), "width": width, "dropped": dropped}
