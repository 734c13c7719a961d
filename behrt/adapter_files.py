"""How are adapters, and all that was trained beside them, saved and loaded?

On disk an adapter has the layout of Hugging Face PEFT, `adapter_config.json` beside `adapter_model.safetensors`.
Modules that are trained whole (embeddings, head, norms) are stored there too, as PEFT's `modules_to_save`; what is
frozen is not. PEFT's `PeftModel.from_pretrained` on the plain model gives the same outputs, but for
rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from behrt.config import UserError, refuse_what_is_no_file
from behrt.files import replacing_file, write_text
from behrt.lora import (
    LAYERS_OF_TARGET,
    LoRALinear,
    adapted_layers,
    insert_adapters,
    layers_to_adapt,
    plain_parameters,
    train_only,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."

PICKLE_SUFFIXES = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
"""Of files that other tools keep pickles in."""

UNSUPPORTED_PEFT_OPTIONS = ("use_dora", "use_rslora", "alora_invocation_tokens", "rank_pattern", "alpha_pattern",
                            "fan_in_fan_out", "layers_to_transform", "lora_bias", "trainable_token_indices",
                            "target_parameters", "exclude_modules", "layer_replication")  # fmt: skip
"""PEFT options that would change what the adapter computes or where it sits; an adapter that sets one is refused."""


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bits, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frozen_sha256(model: nn.Module) -> str:
    """The hash of everything that training leaves as it is, under the names of the model with its adapters."""
    return sha256_of({name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad})


def _trained_whole(module: nn.Module, name: str = "") -> list[str]:
    """The largest modules of which every parameter is trained; with the adapters they hold all that is trained."""
    parameters = list(module.parameters())
    holds_adapter = any(isinstance(part, LoRALinear) for part in module.modules())
    if isinstance(module, LoRALinear) or not any(parameter.requires_grad for parameter in parameters):
        return []
    callable_whole = not isinstance(module, nn.ModuleList)  # PEFT calls what it saves
    if name and callable_whole and not holds_adapter and all(parameter.requires_grad for parameter in parameters):
        return [name]
    assert not any(parameter.requires_grad for parameter in module.parameters(recurse=False)), (
        f"{name or 'the model'} is trained in part, which the layout cannot store"
    )
    return [
        whole
        for child_name, child in module.named_children()
        for whole in _trained_whole(child, f"{name}.{child_name}".lstrip("."))
    ]


def _adapter_config(rank: int, alpha: float, dropout: float, layers: Iterable[str], whole: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "modules_to_save": whole or None,
    }


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Writes adapters and all else that is trained, in the PEFT layout; nothing that is frozen.

    The header of the weights keeps `frozen_sha256(model)`, and `load_adapter` refuses a base with another one.

    Args:
        model: with adapters.
        folder: made where it is missing; other files in it stay.

    Raises:
        UserError: the folder cannot be written.
    """
    layers = adapted_layers(model)
    assert layers, "a model without adapters is saved whole"
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora.A
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora.B
    plain = plain_parameters(model)
    tensors.update({PEFT_PREFIX + name: parameter for name, parameter in plain.items() if parameter.requires_grad})
    lora = next(iter(layers.values())).lora
    config = json.dumps(_adapter_config(lora.rank, lora.alpha, lora.dropout, layers, _trained_whole(model)), indent=2)
    header = {
        "format": "pt",
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "frozen_sha256": frozen_sha256(model),
    }
    weights = to_safetensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata=header)
    try:
        write_text(folder / CONFIG_FILE, config)
        with replacing_file(folder / WEIGHTS_FILE) as beside:
            beside.write_bytes(weights)
    except OSError as error:
        raise UserError(f"{folder}: the adapter cannot be written: {error.strerror}") from None


def refuse_pickles(folder: Path) -> None:
    """Refuses a folder of weights that carries a pickle, under whatever name: unpickling runs the code that is in it.

    Nothing here would unpickle it. But a folder that carries one was not made by `save_checkpoint` or `save_adapter`,
    and whoever opens it with other tools trusts that it was looked at.

    Raises:
        UserError: there is one in it.
    """
    for file in sorted(folder.rglob("*")):
        if file.is_file() and (file.suffix.lower() in PICKLE_SUFFIXES or _is_pickled(file)):
            raise UserError(
                f"{file}: a pickle, or named like one, and loading that can run any code; only safetensors files are "
                "loaded: remove it, or save the weights as safetensors"
            )


def _is_pickled(file: Path) -> bool:
    """Whether the file begins as those of `pickle` (from protocol 2 on) and `torch.save` do."""
    try:
        with file.open("rb") as handle:
            start = handle.read(9)
    except OSError:  # whoever loads it will say so
        return False
    if start[:4] == b"PK\3\4":
        return True
    # A safetensors file begins with the length of its header, which may have the same two bytes.
    is_safetensors = start[4:9] == b"\0\0\0\0{"
    return start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5") and not is_safetensors


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    """The adapter's configuration, checked, and the SHA-256 of its file."""
    refuse_what_is_no_file(path)
    try:
        raw = path.read_bytes()
        config = json.loads(raw)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; expected the folder of a saved adapter") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON; the file is damaged, save the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: expected a configuration with peft_type LORA")
    used = [option for option in UNSUPPORTED_PEFT_OPTIONS if config.get(option)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise UserError(f"{path}: option {used[0]} is not supported; save a plain LoRA adapter")
    expected: dict[str, tuple[type, ...]] = {
        "r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float), "target_modules": (list,),
    }  # fmt: skip
    for key, kinds in expected.items():
        if not isinstance(config.get(key), kinds) or isinstance(config[key], bool):
            raise UserError(f"{path}: {key} is missing or of the wrong type; expected {kinds[-1].__name__}")
    return config, hashlib.sha256(raw).hexdigest()


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its header's notes. No other format is ever opened."""
    refuse_what_is_no_file(path)
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except OSError as error:
        reason = error.strerror or "no such file"
        raise UserError(f"{path}: cannot be read: {reason}; only safetensors files are loaded") from None
    except SafetensorError:
        raise UserError(f"{path}: not a whole safetensors file; it is damaged, save the adapter again") from None


def _targets_of(layer_names: list[Any], path: Path) -> tuple[str, ...]:
    targets = tuple(target for target, layers in LAYERS_OF_TARGET.items() if set(layers) & set(map(str, layer_names)))
    if {layer for target in targets for layer in LAYERS_OF_TARGET[target]} != set(layer_names):
        raise UserError(f"{path}: target_modules: expected some of query, key, value, output, and up only with down")
    return targets


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Puts a saved adapter, and all that was trained with it, on the plain base model it was trained on, in place.

    Outputs and trainability are then those of the model that was saved, bit for bit. Adapters that PEFT wrote load too
    (without a fingerprint, the base cannot be checked for those).

    Raises:
        UserError: a file is missing or damaged, or is a pickle; the two files are from different saves; the shapes do
            not fit the model, or its frozen weights are not those the adapter was trained on. The model is then
            unchanged.
    """
    config, config_sha256 = _read_config(folder / CONFIG_FILE)
    refuse_pickles(folder)
    weights_path = folder / WEIGHTS_FILE
    tensors, header = _read_weights(weights_path)
    if header.get("config_sha256", config_sha256) != config_sha256:
        raise UserError(
            f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} are not from the same save; save the adapter again"
        )
    if present := adapted_layers(model):
        raise UserError(f"{folder}: expected a plain model to load into, found one with {len(present)} adapters")
    targets = _targets_of(config["target_modules"], folder / CONFIG_FILE)
    rank = int(config["r"])
    layers = layers_to_adapt(model, targets)
    plain = plain_parameters(model)
    frozen = {name for name in plain if PEFT_PREFIX + name not in tensors}
    expected = {PEFT_PREFIX + name: tuple(plain[name].shape) for name in plain if name not in frozen}
    for name, layer in layers.items():
        expected[f"{PEFT_PREFIX}{name}.lora_A.weight"] = (rank, layer.in_features)
        expected[f"{PEFT_PREFIX}{name}.lora_B.weight"] = (layer.out_features, rank)
    if missing := expected.keys() - tensors.keys():
        raise UserError(
            f"{weights_path}: {len(missing)} tensors are missing, {min(missing)} is one; is it this model's?"
        )
    if unknown := tensors.keys() - expected.keys():
        raise UserError(
            f"{weights_path}: {len(unknown)} tensors fit nowhere, {min(unknown)} is one; is it this model's?"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape)
            raise UserError(f"{weights_path}: {name} has shape {found}, the model expects {shape}; is it this model's?")
    under_adapters = {f"{name}.{leaf}": f"{name}.base.{leaf}" for name in layers for leaf in ("weight", "bias")}
    base_sha256 = sha256_of({under_adapters.get(name, name): plain[name] for name in frozen})
    if header.get("frozen_sha256", base_sha256) != base_sha256:
        raise UserError(f"{folder}: was trained over other frozen weights than this model's; load it into its own base")
    try:  # a generator of its own, so that loading disturbs no one's draws
        insert_adapters(model, rank, config["lora_alpha"], config["lora_dropout"], targets, torch.Generator())
    except UserError as error:
        raise UserError(f"{folder / CONFIG_FILE}: {error}") from None
    parameters = {PEFT_PREFIX + name: plain[name] for name in plain}
    for name, adapted in adapted_layers(model).items():
        parameters[f"{PEFT_PREFIX}{name}.lora_A.weight"] = adapted.lora.A
        parameters[f"{PEFT_PREFIX}{name}.lora_B.weight"] = adapted.lora.B
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    train_only(model, [parameters[name] for name in tensors])
    return model
