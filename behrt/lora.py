"""How does a linear layer get a LoRA adapter, and how are adapters merged, saved and loaded?

LoRA (Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models") leaves a linear layer as it is and adds the
product of two thin trainable matrices: y = base(x) + alpha/rank · B(A(dropout(x))). B starts at zero, so that a fresh
adapter changes nothing.

On disk an adapter has the layout of Hugging Face PEFT, `adapter_config.json` beside `adapter_model.safetensors`.
Modules that are trained whole (embeddings, head, norms) are stored there too, as PEFT's `modules_to_save`; what is
frozen is not. PEFT's `PeftModel.from_pretrained` on the plain model gives the same outputs, but for
rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from behrt.cheap_layers import drop, lowered
from behrt.config import UserError, nearest, refuse_what_is_no_file
from behrt.files import replacing_file, write_text
from behrt.model import BEHRT, uniform_

LAYERS_OF_TARGET: dict[str, tuple[str, ...]] = {
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "output": ("output",),
    "feedforward": ("up", "down"),
}
"""The names of the linear layers that each `--lora-targets` name stands for."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."

PICKLE_SUFFIXES = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
"""Of files that other tools keep pickles in."""

UNSUPPORTED_PEFT_OPTIONS = ("use_dora", "use_rslora", "alora_invocation_tokens", "rank_pattern", "alpha_pattern",
                            "fan_in_fan_out", "layers_to_transform", "lora_bias", "trainable_token_indices",
                            "target_parameters", "exclude_modules", "layer_replication")  # fmt: skip
"""PEFT options that would change what the adapter computes or where it sits; an adapter that sets one is refused."""


class Adapter(nn.Module):
    """One LoRA pair.

    Attributes:
        A: [rank, in_features]; B: [out_features, rank], zero at first.
        scaling: alpha/rank, the factor of B·A.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scaling = alpha / rank
        self.A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor, base: nn.Linear) -> Tensor:
        """What `base` and the adapter make of `x` [..., in_features]: [..., out_features]."""
        x = lowered(x)
        dropped = self.training and self.dropout > 0
        if dropped or any(parameter.requires_grad for parameter in base.parameters()):
            thin = F.linear(drop(x, self.dropout) if dropped else x, self.A) * self.scaling  # scaled where it is thin
            result: Tensor = base(x).flatten(0, -2).addmm(thin.flatten(0, -2), self.B.T)
        else:
            result = _Folded.apply(x.flatten(0, -2), base.weight, base.bias, self.A, self.B, self.scaling)  # type: ignore[no-untyped-call]
        return result.view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


class _Folded(torch.autograd.Function):
    """(weight + scaling · B·A) x + bias, one product over the tokens each way, where adapters beside it take four.

    The sum is rounded once, from the precision of the weights. What training needs of the adapter itself are products
    as thin as its rank; the weight has no gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling):  # type: ignore[no-untyped-def]
        with torch.autocast(x.device.type, enabled=False):  # it would round before the sum
            folded = torch.addmm(weight, B, A, alpha=scaling).to(x.dtype)  # [out, in]
            ctx.save_for_backward(x, folded, A, B)
            ctx.scaling = scaling
            return F.linear(x, folded, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, folded, A, B = ctx.saved_tensors
        for_x = gradient @ folded if ctx.needs_input_grad[0] else None
        # Of two orders of the factors, this one keeps the tokens in rows, for which CPUs have the faster products.
        for_A = (x.T @ (gradient @ B.to(x.dtype))).T.to(A.dtype).mul_(ctx.scaling)
        for_B = ((x @ A.to(x.dtype).T).T @ gradient).T.to(B.dtype).mul_(ctx.scaling)
        return for_x, None, None, for_A, for_B, None


class LoRALinear(nn.Module):
    """A linear layer with an adapter beside it.

    It has no `weight` on purpose: code that would read the weight instead of calling the layer, and so pass the adapter
    by, fails at once.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.lora = Adapter(base, rank, alpha, dropout)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.lora(x, self.base)
        return result


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every layer that has an adapter, by its full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def train_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Exactly these parameters of the model are trained from now on, all others frozen.

    The only place that sets `requires_grad`. It goes by identity: a name that happens to contain "head" means nothing.
    """
    trained = {id(parameter) for parameter in parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def _layers_to_adapt(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The encoder's linear layers that `targets` name, by full name, in the order of the model."""
    layers: dict[str, nn.Linear] = {}
    matched = set()
    for prefix, encoder in ((name, m.encoder) for name, m in model.named_modules() if isinstance(m, BEHRT)):
        for name, module in encoder.named_modules():
            for target in targets:
                if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LAYERS_OF_TARGET.get(target, ()):
                    layers[f"{prefix}.encoder.{name}".lstrip(".")] = module
                    matched.add(target)
    for target in targets:
        if target not in matched:
            hint = "" if target in LAYERS_OF_TARGET else nearest(target, list(LAYERS_OF_TARGET))
            raise UserError(f"--lora-targets: {target!r} matches no linear layer of the encoder{hint}")
    if not layers:
        raise UserError(f"--lora-targets: none given; choose from {', '.join(LAYERS_OF_TARGET)}")
    return layers


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def insert_adapters(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] = ("query", "key", "value", "output"),
    generator: torch.Generator | None = None,
) -> None:
    """Puts an adapter on every target layer, in place, and freezes those layers; nothing else is frozen or freed.

    Args:
        model: a `BEHRT`, or a model that contains one.
        rank: inner width of each adapter, from 1 to the width (in or out, the smaller) of the narrowest target.
        alpha: the adapter's output is scaled by alpha/rank; None is twice the rank.
        dropout: on the adapter's input, while training.
        targets: names in `LAYERS_OF_TARGET`.
        generator: for A, drawn as in PEFT from U(±1/sqrt(in_features)); None is torch's own generator.

    Raises:
        UserError: adapters are there already, or a value is out of its range. The model is then unchanged.
    """
    if present := adapted_layers(model):
        raise UserError(
            f"the model has {len(present)} adapters already: merge them first, or start from the plain model"
        )
    alpha = 2.0 * rank if alpha is None else float(alpha)
    layers = _layers_to_adapt(model, targets)
    narrowest = min(layers, key=lambda name: min(layers[name].in_features, layers[name].out_features))
    width = min(layers[narrowest].in_features, layers[narrowest].out_features)
    if not 1 <= rank <= width:
        raise UserError(f"--lora-rank {rank}: expected 1 to {width}, the width of {narrowest}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"--lora-alpha {alpha:g}: expected a number above 0")
    if not 0 <= dropout < 1:
        raise UserError(f"--lora-dropout {dropout:g}: expected 0 up to, not including, 1")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    for name, base in layers.items():
        layer = LoRALinear(base, rank, alpha, dropout).train(base.training)
        uniform_(layer.lora.A, 1 / math.sqrt(base.in_features), generator)
        _replace(model, name, layer)
        trained += layer.lora.parameters()
    train_only(model, [parameter for parameter in trained if id(parameter) not in frozen])


def merge_adapters(model: nn.Module) -> nn.Module:
    """Adds every adapter to its layer's weight, in place, and returns the model, which is plain again.

    In evaluation mode the outputs stay the same but for rounding (1e-6 in float32). The merged layers stay frozen.
    """
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            weight, a, b = (tensor.cpu().double() for tensor in (layer.base.weight, layer.lora.A, layer.lora.B))
            # Rounded once, from float64, so that the same adapter merges into the same weights on every machine.
            layer.base.weight.copy_(weight + layer.lora.scaling * (b @ a))  # [out, in]
            _replace(model, name, layer.base)
    return model


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the model without its adapters, under the names that they have where there are none."""
    names = dict(model.named_parameters())
    for layer_name, layer in adapted_layers(model).items():
        for name, _ in layer.lora.named_parameters():
            del names[f"{layer_name}.lora.{name}"]
        for name, _ in layer.base.named_parameters():
            names[f"{layer_name}.{name}"] = names.pop(f"{layer_name}.base.{name}")
    return names


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
    layers = _layers_to_adapt(model, targets)
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
