"""How does a linear layer get a LoRA adapter, and how is one merged into its weight?

LoRA (Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models") leaves a linear layer as it is and adds the
product of two thin trainable matrices: y = base(x) + alpha/rank · B(A(dropout(x))). B starts at zero, so that a fresh
adapter changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from behrt.cheap_layers import drop, lowered
from behrt.config import UserError, nearest
from behrt.model import BEHRT, uniform_

LAYERS_OF_TARGET: dict[str, tuple[str, ...]] = {
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "output": ("output",),
    "feedforward": ("up", "down"),
}
"""The names of the linear layers that each `--lora-targets` name stands for."""


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


def layers_to_adapt(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
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
    layers = layers_to_adapt(model, targets)
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
