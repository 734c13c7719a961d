"""Which parameters are trained, how many of how many, and do they all have an effect?

Every parameter of a model belongs to exactly one of four groups, by identity and not by name: `lora` (the adapters),
`embeddings` and `encoder` (the rest of the `BEHRT` inside the model), `head` (everything outside it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from behrt.config import UserError
from behrt.lora import adapted_layers, insert_adapters, train_only
from behrt.model import BEHRT, MaskedLMHead

Model = TypeVar("Model", bound=nn.Module)


class ParameterCounts(TypedDict):
    """Numbers of parameters, and percent of all of them; the four groups sum to the total."""

    total: int
    trainable: int
    frozen: int
    lora: int
    trainable_percent: float
    lora_percent: float
    embeddings: int
    embeddings_trainable: int
    encoder: int
    encoder_trainable: int
    head: int
    head_trainable: int
    lora_trainable: int


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of `model`, each once, in the groups `embeddings`, `encoder`, `head` and `lora`."""
    encoders = [module for module in model.modules() if isinstance(module, BEHRT)]
    if len(encoders) != 1:
        raise UserError(f"{type(model).__name__}: expected a BEHRT, or a model with one inside; found {len(encoders)}")
    group_of = {id(parameter): "head" for parameter in model.parameters()}
    group_of.update({id(parameter): "encoder" for parameter in encoders[0].parameters()})
    group_of.update({id(parameter): "embeddings" for parameter in encoders[0].embeddings.parameters()})
    for layer in adapted_layers(model).values():
        group_of.update({id(parameter): "lora" for parameter in layer.lora.parameters()})
    groups: dict[str, list[nn.Parameter]] = {"embeddings": [], "encoder": [], "head": [], "lora": []}
    for parameter in model.parameters():
        groups[group_of[id(parameter)]].append(parameter)
    return groups


def inner_matrices(model: nn.Module) -> list[Tensor]:
    """The matrices from vectors to vectors: of adapters, and of linear layers save a decoder, whose rows are codes."""
    decoders = {module.decoder for module in model.modules() if isinstance(module, MaskedLMHead)}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in decoders]
    adapters = [layer.lora for layer in adapted_layers(model).values()]
    return [layer.weight for layer in linear] + [matrix for lora in adapters for matrix in (lora.A, lora.B)]


def count_parameters(model: nn.Module) -> ParameterCounts:
    """How many parameters the model has, how many are trained, in total and by group.

    >>> from behrt.config import BEHRTConfig
    >>> from behrt.model import BEHRTForMaskedLM
    >>> model = apply_lora_to_behrt(BEHRTForMaskedLM(BEHRTConfig.small(vocab_size=1000)), rank=8)
    >>> counts = count_parameters(model)
    >>> counts["embeddings"], counts["head"], counts["lora"], counts["trainable"]
    (109824, 145768, 16384, 271976)

    Raises:
        UserError: the model has no `BEHRT` inside.
    """
    groups = parameter_groups(model)
    total = {name: sum(p.numel() for p in group) for name, group in groups.items()}
    trainable = {name: sum(p.numel() for p in group if p.requires_grad) for name, group in groups.items()}
    all_parameters = sum(parameter.numel() for parameter in model.parameters())
    all_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(total.values()) == all_parameters, "the groups leave parameters out, or count them twice"
    assert sum(trainable.values()) == all_trainable
    return {
        "total": all_parameters,
        "trainable": all_trainable,
        "frozen": all_parameters - all_trainable,
        "lora": total["lora"],
        "trainable_percent": 100 * all_trainable / all_parameters,
        "lora_percent": 100 * total["lora"] / all_parameters,
        "embeddings": total["embeddings"],
        "embeddings_trainable": trainable["embeddings"],
        "encoder": total["encoder"],
        "encoder_trainable": trainable["encoder"],
        "head": total["head"],
        "head_trainable": trainable["head"],
        "lora_trainable": trainable["lora"],
    }


def set_trainable(
    model: nn.Module, *, freeze_base: bool = False, train_embeddings: bool = True, train_head: bool = True
) -> None:
    """Decides for every parameter whether it is trained, with adapters or without.

    Adapters always are; the layers they sit on never are. `freeze_base` freezes the rest of the encoder, its norms
    included; embeddings and head follow their own flags in either case.
    """
    groups = parameter_groups(model)
    under_adapters = {id(p) for layer in adapted_layers(model).values() for p in layer.base.parameters()}
    trained = list(groups["lora"])
    if not freeze_base:
        trained += [parameter for parameter in groups["encoder"] if id(parameter) not in under_adapters]
    if train_embeddings:
        trained += groups["embeddings"]
    if train_head:
        trained += groups["head"]
    train_only(model, trained)


def apply_lora_to_behrt(
    model: Model,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] = ("query", "key", "value", "output"),
    freeze_base: bool = True,
    train_embeddings: bool = True,
    train_head: bool = True,
    *,
    generator: torch.Generator | None = None,
) -> Model:
    """Puts adapters on the encoder, decides what is trained, and returns the model, which is changed in place.

    Where the base is random, embeddings and head have to be trained: with both frozen at random, nothing can be read
    from the codes nor said about them, and the loss stays at ln(vocab_size) (troubleshooting guide, "Embeddings and MLM
    Head Were Frozen"). Freeze them for a pre-trained base only.

    Args:
        model: a `BEHRT`, or a model that contains one.
        rank, alpha, dropout, targets, generator: see `behrt.lora.insert_adapters`.
        freeze_base, train_embeddings, train_head: see `set_trainable`.

    Raises:
        UserError: a value is out of its range, a target matches nothing, or the model has adapters already.
    """
    parameter_groups(model)  # refuses a model that is none of ours before anything is changed
    insert_adapters(model, rank, alpha, dropout, targets, generator)
    set_trainable(model, freeze_base=freeze_base, train_embeddings=train_embeddings, train_head=train_head)
    return model


def silent_adapters(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[str]:
    """The layers whose adapter does not act: its B gets no gradient, or changing B leaves the output as it is.

    Counting parameters cannot show this: an adapter on a layer whose weight is read instead of called counts as trained
    and never learns. Weights, gradients, modes and random states are left as they were.

    Args:
        model: takes `inputs` as keyword arguments and returns one tensor.
        inputs: one small batch. A patient in it needs two tokens or more: over a single one the softmax is constant,
            and adapters on query and key are silent by right.

    Returns:
        Names of layers, in the order of the model; empty if every adapter acts.
    """
    layers = adapted_layers(model)
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    draws = torch.Generator().manual_seed(0)
    try:
        model.eval()  # without dropout two forward passes are comparable, and none draws anything
        with torch.enable_grad():
            output = model(**inputs)
            # A random direction: the plain sum, or the sum of squares, of a normalised vector hardly changes at all.
            direction = torch.randn(output.shape, generator=draws).to(device)
            trained = {name: layer.lora.B for name, layer in layers.items() if layer.lora.B.requires_grad}
            loss = (output.float() * direction).sum()
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True) if trained else ()
        learns = {name for name, grad in zip(trained, gradients, strict=True) if grad is not None and bool(grad.any())}
        output = output.detach()
        silent = []
        for name, layer in layers.items():
            changed = layer.lora.B.detach() + torch.randn(layer.lora.B.shape, generator=draws).to(layer.lora.B)
            with torch.no_grad():
                moved = functional_call(model, {f"{name}.lora.B": changed}, kwargs=dict(inputs))
            # Above what the order of additions may change on an accelerator.
            acts = bool((moved - output).abs().max() > 1e-5 * output.abs().max())
            if name not in learns or not acts:
                silent.append(name)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return silent
