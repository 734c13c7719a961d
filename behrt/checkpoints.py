"""How are the weights of a run saved, and how do they come back?

A checkpoint is a folder of safetensors and JSON, never pickle. It holds what was trained and nothing that was frozen: a
fully trained model whole (`model.safetensors`), a LoRA model as its adapter in PEFT's layout together with every other
trained tensor. The frozen base is named by how it was made (seed, and the run it started from), made again on loading,
and refused where its fingerprint is no longer the one that the adapter was trained on. Checksums stand beside: a file
that was cut short or changed is never loaded.

A checkpoint from which a training can go on holds more (`TRAINING_FILES`), under checksums of its own, so that the
weights can travel without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from behrt.adapter_files import frozen_sha256, load_adapter, refuse_pickles, save_adapter
from behrt.config import MAX_SEED, BEHRTConfig, UserError, refuse_what_is_no_file
from behrt.files import read_json, replacing_folder, verify_checksums, write_checksums, write_json
from behrt.lora import adapted_layers, merge_adapters, train_only
from behrt.model import BEHRTForMaskedLM
from behrt.vocabulary import FIRST_CODE, Vocabulary

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 had no checksums."""

CHECKSUMS_FILE = "SHA256SUMS"
TRAINED_FILE = "trained.safetensors"
"""What was trained of a fine-tuned model without adapters: all of it, or the head alone."""
OPTIMIZER_FILE = "optimizer.safetensors"
BEST_FILE = "best.safetensors"
STATE_FILE = "training_state.json"
TRAINING_CHECKSUMS_FILE = "SHA256SUMS.training"
TRAINING_FILES = (OPTIMIZER_FILE, BEST_FILE, STATE_FILE, TRAINING_CHECKSUMS_FILE)
"""Beside the weights where the training can go on from them."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """Where the weights of a run started.

    Attributes:
        seed: of the random initialisation.
        init_from: the pre-trained run, as it was named; None for a random start.
        init_from_run: its MLflow run id, where it has one; found even when its folder has moved.
        init_from_checkpoint: `best` or `last`.
    """

    seed: int
    init_from: str | None = None
    init_from_run: str | None = None
    init_from_checkpoint: str = "best"

    @property
    def is_sound(self) -> bool:
        """Whether the fields, which may come from a file, are of their types."""
        texts = (self.init_from, self.init_from_run)
        is_seed = isinstance(self.seed, int) and 0 <= self.seed <= MAX_SEED
        return is_seed and all(text is None or isinstance(text, str) for text in texts)


@dataclass(frozen=True)
class Transplant:
    """What a pre-trained model gave to a new one.

    Attributes:
        shared_codes: ordinary codes that both vocabularies have; their rows were copied.
        new_codes: ordinary codes that only the new vocabulary has; their rows stay random.
        new_positions: positions beyond those of the pre-trained model; their rows stay random.
    """

    shared_codes: int
    new_codes: int
    new_positions: int


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a checkpoint holds beside the weights so that the training can go on.

    Attributes:
        optimizer: that trains the model.
        best_weights: what is trained, by name, after the best epoch; empty where that is the checkpoint's own, or none.
        state: everything else, as JSON.
    """

    optimizer: torch.optim.Optimizer
    best_weights: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the model as it was trained (adapters not merged), in evaluation mode on the CPU."""

    model: BEHRTForMaskedLM
    vocabulary: Vocabulary
    epoch: int
    base: Base


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    *,
    vocabulary: Vocabulary,
    epoch: int,
    base: Base,
    task: Mapping[str, Any] | None = None,
    training: Training | None = None,
    former_to: Path | None = None,
) -> None:
    """Writes `folder`, whole or not at all; a former checkpoint there is replaced, or moved to `former_to`.

    Args:
        task: what a fine-tuned model predicts; of such a model, what was not trained is never written.

    Raises:
        OSError: the disk is full, above all; a former checkpoint is then as it was.
    """
    with replacing_folder(folder, former_to=former_to) as beside:
        try:
            _write_weights(beside, model, vocabulary=vocabulary, epoch=epoch, base=base, task=task)
            write_checksums(beside, CHECKSUMS_FILE, [path for path in beside.iterdir() if path.is_file()])
            if training is not None:
                _write_training(beside, model, training)
        except SafetensorError as error:  # of a disk that is full it only knows the text
            raise OSError(f"{folder}: the checkpoint cannot be written: {error}") from None


def _write_weights(
    folder: Path,
    model: nn.Module,
    *,
    vocabulary: Vocabulary,
    epoch: int,
    base: Base,
    task: Mapping[str, Any] | None,
) -> None:
    is_lora = bool(adapted_layers(model))
    config = model.config
    assert isinstance(config, BEHRTConfig)
    if is_lora:
        save_adapter(model, folder)
    elif task is not None:
        save_trained(model, folder)
    else:
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    # without its counts, and so without anything but names: this file travels
    Vocabulary.of_codes(vocabulary.tokens[FIRST_CODE:]).save(folder / "vocabulary.json")
    write_json(
        folder / "checkpoint.json",
        {
            "format_version": FORMAT_VERSION,
            "epoch": epoch,
            "lora": is_lora,
            "model": config.model_dump(),
            "base": asdict(base),
            **({} if task is None else {"task": task}),
        },
    )


def save_trained(model: nn.Module, folder: Path) -> None:
    """Writes what is trained of a model without adapters, and the fingerprint of the rest."""
    trained = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    save_file(trained, folder / TRAINED_FILE, metadata={"format": "pt", "frozen_sha256": frozen_sha256(model)})


def holds_everything(folder: Path, model: nn.Module) -> bool:
    """Whether `save_trained` wrote all parameters of such a model, so that no base is needed."""
    return _load_tensors(folder / TRAINED_FILE).keys() == dict(model.named_parameters()).keys()


def load_trained(model: nn.Module, folder: Path) -> None:
    """Puts what `save_trained` wrote into a model that was built alike; these parameters are trained, the rest frozen.

    Raises:
        UserError: the file is missing or damaged, does not fit, or was trained over other frozen weights.
    """
    path = folder / TRAINED_FILE
    tensors = _load_tensors(path)
    parameters = dict(model.named_parameters())
    if any(name not in parameters or parameters[name].shape != value.shape for name, value in tensors.items()):
        raise UserError(f"{path}: its tensors do not fit the model that checkpoint.json describes")
    train_only(model, [parameters[name] for name in tensors])
    with safe_open(path, framework="pt") as handle:
        sha256 = (handle.metadata() or {}).get("frozen_sha256")
    if sha256 != frozen_sha256(model):
        raise UserError(f"{folder}: was trained over other frozen weights than this model's; load it into its own base")
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)


def _write_training(folder: Path, model: nn.Module, training: Training) -> None:
    written = [folder / OPTIMIZER_FILE, folder / STATE_FILE]
    save_file(_optimizer_tensors(training.optimizer, model), folder / OPTIMIZER_FILE)
    write_json(folder / STATE_FILE, training.state)
    if training.best_weights:
        written.append(folder / BEST_FILE)
        save_file(dict(training.best_weights), folder / BEST_FILE)
    write_checksums(folder, TRAINING_CHECKSUMS_FILE, written)


def drop_training(folder: Path) -> None:
    """Leaves the weights of a checkpoint alone; its training cannot go on from it any more."""
    for name in reversed(TRAINING_FILES):  # the checksums first: without them nothing goes on from the rest
        (folder / name).unlink(missing_ok=True)


def read_training_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint from which a training can go on, all of its files verified.

    Raises:
        UserError: there is none, or some file is missing, was cut short or changed.
    """
    _read_about(folder)
    verify_checksums(folder, CHECKSUMS_FILE)
    verify_checksums(folder, TRAINING_CHECKSUMS_FILE)
    return read_json(folder / STATE_FILE, missing=f"{folder} holds no state of a training")


def read_best_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights after the best epoch, as far as they are not those of the checkpoint itself.

    A file that the checksums do not list is another checkpoint's, which lay in the same place before.
    """
    listed = (folder / TRAINING_CHECKSUMS_FILE).read_text(encoding="utf-8").splitlines()
    return _load_tensors(folder / BEST_FILE) if any(line.endswith(f"  {BEST_FILE}") for line in listed) else {}


def read_base(folder: Path) -> Base:
    """Where the weights of a checkpoint started. Raises `UserError` where it does not say."""
    try:
        base = Base(**_read_about(folder)["base"])
    except (KeyError, TypeError):
        base = None
    if base is None or not base.is_sound:
        raise UserError(f"{folder / 'checkpoint.json'}: is damaged; choose another checkpoint")
    return base


@dataclass(frozen=True, kw_only=True)
class About:
    """What `checkpoint.json` says.

    Attributes:
        task: what a fine-tuned model predicts; None of a pre-trained one.
    """

    config: BEHRTConfig
    base: Base
    epoch: int
    is_lora: bool
    task: dict[str, Any] | None


def read_about(folder: Path) -> About:
    """What a checkpoint says of itself, its files verified. Raises `UserError` where it is none, or damaged."""
    about = _read_about(folder)
    refuse_pickles(folder)
    if about["format_version"] > 1:
        verify_checksums(folder, CHECKSUMS_FILE)
    try:
        config = BEHRTConfig(**about["model"])
        base = Base(**about["base"])
        epoch, is_lora, task = about["epoch"], about["lora"], about.get("task")
        if not (isinstance(epoch, int) and isinstance(is_lora, bool) and base.is_sound):
            raise TypeError
        if not (task is None or isinstance(task, dict)):
            raise TypeError
    except (KeyError, TypeError, UserError):
        raise UserError(f"{folder / 'checkpoint.json'}: is damaged; choose another checkpoint") from None
    return About(config=config, base=base, epoch=epoch, is_lora=is_lora, task=task)


def load_checkpoint(folder: Path, *, load_base: Callable[[Base], Checkpoint] | None = None) -> Checkpoint:
    """The checkpoint in `folder`.

    Args:
        load_base: gives the pre-trained run that a LoRA checkpoint was trained on (`runs.load_run`).

    Raises:
        UserError: no checkpoint, a damaged one, or a base that is no longer what it was.
    """
    about = read_about(folder)
    if about.task is not None:
        raise UserError(f"{folder}: is of a fine-tuned run, which predicts a task; name a pre-trained one")
    config, base, epoch, is_lora = about.config, about.base, about.epoch, about.is_lora
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    if not is_lora:
        _refuse_another_shape(config, folder / "model.safetensors")  # before room is made for what it describes
    if is_lora:
        model, _ = make_base(config, vocabulary, base, load_base=load_base)
        load_adapter(model, folder)  # refuses a base that is no longer what it was
    else:
        model = BEHRTForMaskedLM(config)
        _load_state(model, folder / "model.safetensors")
    return Checkpoint(model=model.eval(), vocabulary=vocabulary, epoch=epoch, base=base)


def restore_checkpoint(folder: Path, saved: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the weights of a checkpoint into `model`, which was built alike, and its state into the `optimizer`.

    Args:
        saved: the model that was loaded from it.

    Raises:
        UserError: one of another model, or one without the state of an optimizer.
    """
    state = saved.state_dict()
    if {name: value.shape for name, value in state.items()} != {
        name: value.shape for name, value in model.state_dict().items()
    }:
        raise UserError(f"{folder}: its tensors do not fit the model that the settings describe")
    model.load_state_dict(state)
    _load_optimizer(optimizer, model, folder / OPTIMIZER_FILE)


def make_base(
    config: BEHRTConfig,
    vocabulary: Vocabulary,
    base: Base,
    *,
    load_base: Callable[[Base], Checkpoint] | None = None,
) -> tuple[BEHRTForMaskedLM, Transplant | None]:
    """The model that a run starts from: random by seed, with the weights of `base.init_from` laid over it."""
    model = BEHRTForMaskedLM(config, generator=torch.Generator().manual_seed(base.seed))
    if base.init_from is None:
        return model, None
    assert load_base is not None, "a pre-trained base needs a way to load it"
    return model, transplant(load_base(base), model, vocabulary, name=base.init_from)


def transplant(donor: Checkpoint, model: BEHRTForMaskedLM, vocabulary: Vocabulary, *, name: str) -> Transplant:
    """Copies a pre-trained model's weights into `model`; vocabularies are matched by code, positions by number.

    Raises:
        UserError: the shapes of the encoders differ, or the vocabularies share no code.
    """
    differing = [
        f"{field} {getattr(donor.model.config, field)} there, {getattr(model.config, field)} here"
        for field in BEHRTConfig.model_fields
        if field not in ("vocab_size", "max_position", "dropout")
        and getattr(donor.model.config, field) != getattr(model.config, field)
    ]
    if differing:
        raise UserError(
            f"--init-from: {name}: another shape of model ({'; '.join(differing)}); choose the same --model-size"
        )
    ids_there = {code: index for index, code in enumerate(donor.vocabulary.tokens)}
    pairs = [(here, ids_there[code]) for here, code in enumerate(vocabulary.tokens) if code in ids_there]
    shared = sum(here >= FIRST_CODE for here, _ in pairs)
    new = len(vocabulary.tokens) - FIRST_CODE - shared
    if not shared:
        raise UserError(
            f"--init-from: {name}: its vocabulary does not fit: none of the {new} codes of these records is among its "
            f"{len(ids_there) - FIRST_CODE}; prepare the records with the options of that run"
        )
    rows_here, rows_there = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
    source = merge_adapters(donor.model).state_dict()
    target = model.state_dict()
    positions = min(donor.model.config.max_position, model.config.max_position)
    with torch.no_grad():
        for key, value in target.items():
            if value.shape[:1] == (model.config.vocab_size,) and key.split(".")[-2] in ("codes", "decoder"):
                value[rows_here] = source[key][rows_there]
            elif key.endswith("positions.weight"):
                value[:positions] = source[key][:positions]
            else:
                value.copy_(source[key])
    return Transplant(shared_codes=shared, new_codes=new, new_positions=model.config.max_position - positions)


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / "checkpoint.json"
    about = read_json(path, missing=f"{folder} holds no checkpoint")
    version = about.get("format_version")
    if version not in READABLE_VERSIONS or isinstance(version, bool):
        raise UserError(f"{path}: format version {version}, this behrt reads {READABLE_VERSIONS[-1]}")
    return about


def _load_state(model: nn.Module, path: Path) -> None:
    state = _load_tensors(path)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if {name: tuple(value.shape) for name, value in state.items()} != expected:
        raise UserError(f"{path}: its tensors do not fit the model that checkpoint.json describes")
    model.load_state_dict(state)


def _refuse_another_shape(config: BEHRTConfig, path: Path) -> None:
    """`UserError` unless the file holds the tensors of such a model; only its header is read."""
    size = path.stat().st_size if path.is_file() else 0
    # each layer has tensors, and each number four bytes: a file of this size describes no larger model
    if max(config.num_layers, config.vocab_size, config.hidden_dim, config.feedforward_dim) > size:
        raise UserError(f"{path}: its tensors do not fit the model that checkpoint.json describes")
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in BEHRTForMaskedLM(config).state_dict().items()}
    try:
        with safe_open(path, framework="pt") as handle:
            found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        raise UserError(f"{path}: is missing or damaged; choose another checkpoint") from None
    if found != expected:
        raise UserError(f"{path}: its tensors do not fit the model that checkpoint.json describes")


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    refuse_what_is_no_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        raise UserError(f"{path}: is missing or damaged; choose another checkpoint") from None


def _optimized_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The name of each optimized parameter, in the order in which the optimizer counts them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the optimizer as `<parameter>/<what>`; nothing for a parameter that has never been stepped."""
    names, state = _optimized_names(optimizer, model), optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{what}": tensor.detach().cpu().contiguous()
        for index, tensors in state.items()
        for what, tensor in tensors.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    index = {name: number for number, name in enumerate(_optimized_names(optimizer, model))}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in _load_tensors(path).items():
        name, _, what = key.rpartition("/")
        if name not in index:
            raise UserError(f"{path}: belongs to another model; it trains {name}")
        state.setdefault(index[name], {})[what] = tensor
    shapes = dict(enumerate(parameter.shape for group in optimizer.param_groups for parameter in group["params"]))
    for number, tensors in state.items():
        moments = [tensors.get(what) for what in ("exp_avg", "exp_avg_sq")]
        if "step" not in tensors or any(moment is None or moment.shape != shapes[number] for moment in moments):
            raise UserError(f"{path}: is damaged; it lacks a part of the optimizer's state")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
