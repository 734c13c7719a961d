"""Which options do several commands share?

An option of a setting is named like the setting and is None where it was not given, so that files and defaults show
through.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from behrt.config import SECTION_OF, SECTIONS, SIZES, UserError
from behrt.prepare_options import PrepareOptions

Command = TypeVar("Command", bound=Callable[..., Any])


class _NamedPath(click.Path):
    """A path that has a name: an empty one, as of an unset variable of the shell, would be the working folder."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        if value == "":
            self.fail("expected a path, found nothing", param, context)
        return super().convert(value, param, context)


PATH = _NamedPath(path_type=Path)


class _NumberOrAuto(click.ParamType[int | str]):
    """A whole number, or `auto`: what is measured on this machine, or counted in these records."""

    name = "INTEGER|auto"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int | str:
        if value == "auto":
            return "auto"
        try:
            return int(value)
        except ValueError:
            name = param.opts[0] if param is not None else "number"
            raise UserError(f"{name}: expected a number or auto, found {value!r}") from None


def setting(name: str, help: str, *, type: Any = str, negatable: bool = False) -> Callable[[Command], Command]:
    """The option of one setting: None where it was not given, so that files and defaults show through."""
    default = SECTIONS[SECTION_OF[name]].model_fields[name].default
    if isinstance(default, tuple):
        default = ",".join(default)
    if default is not None and default is not False:
        help = f"{help}  [default: {'yes' if default is True else default}]"
    flag = "--" + name.replace("_", "-")
    declaration = f"{flag}/{flag.replace('--', '--no-', 1)}" if negatable else flag
    return click.option(declaration, name, default=None, type=None if negatable else type, help=help)


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which the help lists them."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


model_options = options(
    setting("model_size", "Size of the model.", type=click.Choice(list(SIZES))),
    setting("vocab_size", "Tokens in the vocabulary, at least the data's own.", type=int),
    setting(
        "max_position", "Longest sequence in tokens, or `auto`: what 99% of the patients need.", type=_NumberOrAuto()
    ),
    setting("dropout", "Dropout in embeddings, attention and layers.", type=float),
)
adaptation_options = options(
    setting("use_lora", "Train LoRA adapters instead of the encoder's own weights.", negatable=True),
    setting("lora_rank", "Rank of the adapters.", type=int),
    setting("lora_alpha", "Adapters are scaled by alpha / rank.  [default: twice the rank]", type=float),
    setting("lora_dropout", "Dropout on the adapters' inputs.", type=float),
    setting("lora_targets", "Wrapped layers, comma-separated; also `feedforward`."),
    setting("freeze_base", "With LoRA, freeze the encoder's own weights.", negatable=True),
    setting("train_embeddings", "Train the embeddings.", negatable=True),
    setting("train_head", "Train the head.", negatable=True),
    setting("init_from", "Start from a pre-trained run: its folder or its MLflow run id."),
)
data_options = options(
    setting("data", "Prepared records (`behrt prepare`); without it, a cohort is simulated."),
    setting("max_patients", "Use only this many training patients.", type=int),
    setting("num_patients", "Patients of the simulated cohort.", type=int),
    setting("structure", "Structure of the simulated cohort.", type=click.Choice(["hmm", "none"])),
    setting("simulation_seed", "Seed of the simulated cohort.", type=int),
)
training_options = options(
    setting("epochs", "Most epochs to train.", type=int),
    setting(
        "batch_size",
        "Patients per optimizer step; with `behrt train`, `auto` is what computes fastest here.",
        type=_NumberOrAuto(),
    ),
    setting("accumulation_steps", "Micro-batches that a step is computed in, to save memory.", type=int),
    setting("lr", "Highest learning rate.", type=float),
    setting(
        "table_rate",
        "Learning rate (and decay) of tables, decoder, biases and norms, as a multiple of --lr.",
        type=float,
    ),
    setting("mlm_probability", "Share of the codes to guess in training; evaluation keeps to 0.15.", type=float),
    setting("weight_decay", "Decoupled weight decay, on matrices only.", type=float),
    setting("warmup_fraction", "Share of all steps in which the learning rate rises.", type=float),
    setting("schedule", "How the learning rate falls.", type=click.Choice(["cosine", "linear", "constant"])),
    setting("gradient_clip", "Largest norm of the gradient.", type=float),
    setting("early_stopping_patience", "Epochs without a better val_loss before stopping; 0 is never.", type=int),
    setting("early_stopping_min_delta", "How much lower counts as better.", type=float),
    setting(
        "stop_on",
        "End a run in progress on findings of the doctor this severe.",
        type=click.Choice(["error", "warning", "never"]),
    ),
    setting(
        "recover", "When a loss is no number, go back to the last checkpoint with a tenth of the rate.", negatable=True
    ),
    setting("checkpoint_minutes", "Minutes between checkpoints inside an epoch.", type=float),
    setting("seed", "Seed of weights, order, masks and dropout.", type=int),
    setting("device", "Where to compute.", type=click.Choice(["auto", "cpu", "cuda", "mps"])),
    setting(
        "precision", "Of matrix products; `auto` follows the hardware.", type=click.Choice(["auto", "fp32", "bf16"])
    ),
    setting("compile", "Compile the layers (CUDA): a minute more at first, for long trainings.", negatable=True),
)
preset_option = click.option(
    "--preset", default=None, help="Start from what learns soonest (quick), or from the guide's advice (m1, a40)."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def prepare_option(name: str, help: str, **settings: Any) -> Callable[[Command], Command]:
    """The option of one field of `PrepareOptions`; what is not given keeps the field's default."""
    default = PrepareOptions.model_fields[name].default
    shown = f"{help}  [default: {default}]" if default is not None else help
    return click.option("--" + name.replace("_", "-"), name, default=None, help=shown, **settings)


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that stand on the command line."""
    return {name: value for name, value in flags.items() if value is not None}


def in_folder(experiment_file: Path | None) -> Path | None:
    """The experiment file itself, also where its folder is named."""
    if experiment_file is not None and experiment_file.is_dir():
        return experiment_file / "experiment.yaml"
    return experiment_file
