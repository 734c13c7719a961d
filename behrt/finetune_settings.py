"""Which settings does a fine-tuning have, given its pre-trained run and the flags?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from behrt.checkpoints import read_about
from behrt.config import (
    FLAGS,
    SIZES,
    BEHRTConfig,
    ExperimentSettings,
    FinetuneSettings,
    UserError,
    build_finetune_settings,
    lay_over,
)
from behrt.runs import checkpoint_folder

DEFAULTS: dict[str, Any] = {"epochs": 30, "batch_size": 32, "early_stopping_patience": 5}
RATE, RATE_OF_ENCODER, RATE_OF_HEAD = 1e-3, 3e-4, 1e-4
"""Learning rates of adapters and head, of a whole encoder, and of a head alone, which begins at its best."""


def finetune_settings(
    *, task: str, labels: Path, run: str, data: Path, flags: Mapping[str, Any], **of_task: Any
) -> FinetuneSettings:
    """The settings of a fine-tuning: flags over what suits the mode, over the shape of the pre-trained model.

    Three modes: adapters and head, embeddings and encoder frozen (the default on a pre-trained encoder); everything
    (`--no-use-lora`, the default from scratch); the head alone (`--no-use-lora --freeze-base`).

    Raises:
        UserError: no such run, one that is fine-tuned already, or flags that do not go together.
    """
    shape = _pretrained_shape(run)
    from_scratch = bool(of_task.get("from_scratch"))
    if from_scratch and of_task.setdefault("head_start", "prevalence") == "probe":
        raise UserError("--head-start probe: a random encoder has nothing to probe; leave it out")
    use_lora = flags.get("use_lora", not from_scratch)
    head_only = not use_lora and flags.get("freeze_base", False)
    if not use_lora:
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"):
            if name in flags:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: has no effect with --no-use-lora; leave one of them out")
    adaptation = {
        "use_lora": use_lora,
        "freeze_base": use_lora or head_only,
        "train_embeddings": from_scratch or not (use_lora or head_only),
        "init_from": None if from_scratch else run,
    }
    model = {**_size_of(shape), "max_position": shape.max_position, "dropout": shape.dropout}
    frozen = flags.get("freeze_base", adaptation["freeze_base"])
    rate = RATE if frozen and not from_scratch else RATE_OF_ENCODER
    if head_only and of_task.get("head_start") != "prevalence":
        rate = RATE_OF_HEAD
    nested: dict[str, Any] = {
        "model": model,
        "adaptation": adaptation,
        "data": {"data": str(data)},
        "training": {**DEFAULTS, "lr": rate},
        "task": {"task": task, "labels": str(labels), "from_run": run, **of_task},
    }
    settings = build_finetune_settings(lay_over(nested, flags), where=FLAGS)
    if from_scratch and head_only:
        raise UserError("--freeze-base: leaves a random encoder random, with --from-scratch; leave one of them out")
    return settings


def settings_to_go_on(begun: ExperimentSettings, flags: Mapping[str, Any], **of_task: Any) -> FinetuneSettings:
    """Those that a fine-tuning was begun with, and over them what is given."""
    nested = lay_over(begun.model_dump(mode="json"), flags)
    return build_finetune_settings({**nested, "task": {**nested["task"], **of_task}}, where=FLAGS)


def _pretrained_shape(run: str) -> BEHRTConfig:
    try:
        about = read_about(checkpoint_folder(run))
    except UserError as error:
        raise UserError(f"--from: {error}") from None
    if about.task is not None:
        raise UserError(f"--from: {run}: is a fine-tuned run; name the pre-trained one")
    return about.config


def _size_of(shape: BEHRTConfig) -> dict[str, Any]:
    """The size with these dimensions, or what departs from the small one."""
    dimensions = {name: getattr(shape, name) for name in SIZES["small"] if name != "max_position"}
    for size, values in SIZES.items():
        if all(values[name] == value for name, value in dimensions.items()):
            return {"model_size": size}
    return {"model_size": "small", **dimensions}
