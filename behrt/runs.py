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
    if not is_run_id(str(target)):
        raise UserError(f"{target}: no such folder, and not an MLflow run id (32 hexadecimal digits)")
    return find_local_run(str(target)) or download_checkpoints(str(target))


def is_run_id(target: str) -> bool:
    """Whether it has the form of an MLflow run id; nothing else is ever looked up or made into a path."""
    return len(target) == 32 and set(target) <= set("0123456789abcdef")


def find_local_run(run_id: str) -> Path | None:
    """The experiment folder below `experiments/`, or the trial below `sweeps/`, that holds the run."""
    experiments = Path("experiments")
    trials = Path("sweeps").glob("*/trials/*/run.json")
    for run_file in [*experiments.glob("*/run.json"), *experiments.glob("*/earlier/*/run.json"), *trials]:
        if run_id_of(run_file.parent) == run_id:
            return run_file.parent
    return None


def run_id_of(folder: Path) -> str | None:
    """The MLflow run id of an experiment folder; None where it holds no run, or one that cannot be read."""
    try:
        run_id = read_run(folder).get("run_id")
    except UserError:
        return None
    return run_id if isinstance(run_id, str) and is_run_id(run_id) else None


def checkpoint_folder(target: str | Path, checkpoint: str = "best") -> Path:
    """The folder of a checkpoint: the one named, or that checkpoint of the run that is named.

    Raises:
        UserError: no such run, or no such checkpoint.
    """
    if checkpoint not in ("best", "last"):
        raise UserError(f"{target}: has the checkpoints best and last, not {checkpoint!r}")
    folder = locate_run(target)
    for candidate in (folder, folder / checkpoint, folder / "checkpoints" / checkpoint):
        if (candidate / "checkpoint.json").exists():
            return candidate
    raise UserError(f"{target}: holds no checkpoint; expected {folder / 'checkpoints' / checkpoint}")


def load_run(target: str | Path, *, checkpoint: str = "best") -> Checkpoint:
    """The model of a run, with its vocabulary, in evaluation mode on the CPU.

    Args:
        target: an experiment folder, a checkpoint folder, or an MLflow run id.
        checkpoint: `best` (lowest `val_loss`) or `last`.

    Raises:
        UserError: no such run, no such checkpoint, or a damaged one.
    """
    return load_checkpoint(checkpoint_folder(target, checkpoint), load_base=load_base_again)


def load_base_again(base: Base) -> Checkpoint:
    """The pre-trained run that a saved model started from: by its run id where that is known here, else as named."""
    assert base.init_from is not None
    # read from a file that somebody else may have made
    run_id = base.init_from_run if is_run_id(str(base.init_from_run)) else None
    folder = find_local_run(run_id) if run_id else None
    if folder is None and run_id and not Path(base.init_from).is_dir():
        folder = download_checkpoints(run_id)
    return load_run(folder or base.init_from, checkpoint=base.init_from_checkpoint)


def name_base(seed: int, init_from: str | None) -> Base:
    """Where a new run starts; a run is remembered by its id and checkpoint beside the name it was given."""
    if init_from is None:
        return Base(seed=seed)
    folder = checkpoint_folder(init_from)
    return Base(
        seed=seed,
        init_from=init_from,
        init_from_run=init_from if is_run_id(init_from) else run_id_of(folder.parent.parent),
        init_from_checkpoint=folder.name if folder.name in ("best", "last") else "best",
    )


def load_base(base: Base) -> Checkpoint:
    """The pre-trained run that a new run starts from: exactly the folder or run that was named."""
    assert base.init_from is not None
    return load_run(base.init_from)
