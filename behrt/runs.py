"""Where is a run, and how does its model come back?"""

from __future__ import annotations

from pathlib import Path

from behrt.checkpoints import Base, Checkpoint, load_checkpoint
from behrt.config import UserError
from behrt.history import read_run
from behrt.tracking import download_checkpoints


def locate_run(target: str | Path) -> Path:
    """The folder of a run: one that is named as it is; an MLflow run id by its local history, else by its artifacts.

    Raises:
        UserError: there is no such folder, and no such run.
    """
    path = Path(target)
    if path.is_dir():
        return path
    run_id = str(target)
    if len(run_id) != 32 or not set(run_id) <= set("0123456789abcdef"):
        raise UserError(f"{target}: no such folder, and not an MLflow run id (32 hexadecimal digits)")
    experiments = Path("experiments")
    for run_file in [*experiments.glob("*/run.json"), *experiments.glob("*/earlier/*/run.json")]:
        if read_run(run_file.parent).get("run_id") == run_id:
            return run_file.parent
    return download_checkpoints(run_id)


def load_run(target: str | Path, *, checkpoint: str = "best") -> Checkpoint:
    """The model of a run, with its vocabulary, in evaluation mode on the CPU.

    Args:
        target: an experiment folder, a checkpoint folder, or an MLflow run id.
        checkpoint: `best` (lowest `val_loss`) or `last`.

    Raises:
        UserError: no such run, no such checkpoint, or a damaged one.
    """
    folder = locate_run(target)
    for candidate in (folder, folder / checkpoint, folder / "checkpoints" / checkpoint):
        if (candidate / "checkpoint.json").exists():
            return load_checkpoint(candidate, load_base=load_pretrained)
    raise UserError(f"{target}: holds no checkpoint; expected {folder / 'checkpoints' / checkpoint}")


def load_pretrained(base: Base) -> Checkpoint:
    """The pre-trained run that a base names: by its run id where it is known, else as it was named."""
    assert base.init_from is not None
    if base.init_from_run is not None:
        try:
            return load_run(base.init_from_run)
        except UserError:
            pass  # not in this store; the name it was given may still lead there
    return load_run(base.init_from)


def name_base(seed: int, init_from: str | None) -> Base:
    """Where a new run starts; a run is remembered by its id beside the name it was given."""
    if init_from is None:
        return Base(seed=seed)
    folder = locate_run(init_from)
    run_id = None
    for candidate in (folder, folder.parent, folder.parent.parent):
        if (candidate / "run.json").exists():
            run_id = read_run(candidate).get("run_id")
            break
    return Base(seed=seed, init_from=init_from, init_from_run=run_id)
