"""Are the counts exact, is trainability decided by identity, and are adapters that do not act found out?"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from behrt.config import BEHRTConfig, UserError
from behrt.lora import LoRALinear, adapted_layers, merge_adapters
from behrt.model import BEHRT, BEHRTForMaskedLM
from behrt.parameters import (
    apply_lora_to_behrt,
    count_parameters,
    parameter_groups,
    set_trainable,
    silent_adapters,
)

TINY = BEHRTConfig(
    vocab_size=50, embedding_dim=12, hidden_dim=16, num_layers=2, num_heads=4, feedforward_dim=32, max_position=12
)
ALL_TARGETS = ("query", "key", "value", "output", "feedforward")
BATCH = {
    "codes": torch.tensor([[2, 7, 8, 3, 9, 3], [2, 11, 3, 12, 13, 3]]),
    "ages": torch.tensor([[61.0] * 4 + [63.0] * 2, [20.0] * 3 + [21.0] * 3]),
    "visits": torch.tensor([[0, 1, 1, 1, 2, 2], [0, 1, 1, 2, 2, 2]]),
}


@pytest.fixture(scope="module")
def large() -> BEHRTForMaskedLM:
    """A plain large model of the guide's vocabulary; on no device, since counting reads no weight."""
    with torch.device("meta"):
        return BEHRTForMaskedLM(BEHRTConfig.large(vocab_size=1000))


def on_output_projections(model: BEHRTForMaskedLM, **options: Any) -> dict[str, Any]:
    adapted = apply_lora_to_behrt(copy.deepcopy(model), rank=16, targets=("output",), **options)
    return dict(count_parameters(adapted))


# The exact counts (the guide's, for a vocabulary of 1,000)


def test_large_with_adapters_on_its_output_projections_has_the_guides_total(large: BEHRTForMaskedLM):
    counts = on_output_projections(large)
    assert counts["total"] == 20_366_312
    assert counts["lora"] == counts["lora_trainable"] == 98_304
    assert f"{counts['lora_percent']:.1f}" == "0.5"


def test_the_92_percent_of_the_guide_have_only_the_wrapped_layers_frozen(large: BEHRTForMaskedLM):
    counts = on_output_projections(large, freeze_base=False)
    assert counts["trainable"] == 18_790_376
    assert counts["frozen"] == 1_575_936
    assert f"{counts['trainable_percent']:.1f}" == "92.3"


def test_the_frozen_base_of_the_guide_leaves_4_percent(large: BEHRTForMaskedLM):
    counts = on_output_projections(large, train_embeddings=False)
    assert counts["trainable"] == 874_984
    assert f"{counts['trainable_percent']:.1f}" == "4.3"
    assert counts["embeddings_trainable"] == counts["encoder_trainable"] == 0


def test_the_fix_of_the_guide_leaves_7_percent(large: BEHRTForMaskedLM):
    counts = on_output_projections(large)
    assert counts["trainable"] == 1_450_984
    assert f"{counts['trainable_percent']:.1f}" == "7.1"


def test_adapters_alone_are_trained_where_all_else_is_frozen(large: BEHRTForMaskedLM):
    counts = on_output_projections(large, train_embeddings=False, train_head=False)
    assert counts["trainable"] == counts["lora"] == 98_304


@pytest.mark.parametrize(("size", "embeddings", "head"), [("small", 109_824, 145_768), ("large", 576_000, 776_680)])
def test_embeddings_and_head_have_the_guides_sizes(size: str, embeddings: int, head: int):
    counts = count_parameters(BEHRTForMaskedLM(BEHRTConfig.of_size(size, vocab_size=1000)))
    assert (counts["embeddings"], counts["head"]) == (embeddings, head)
    assert (counts["embeddings_trainable"], counts["head_trainable"]) == (embeddings, head)


def test_counts_have_exactly_the_promised_keys():
    assert list(count_parameters(BEHRTForMaskedLM(TINY))) == [
        "total", "trainable", "frozen", "lora", "trainable_percent", "lora_percent",
        "embeddings", "embeddings_trainable", "encoder", "encoder_trainable", "head", "head_trainable",
        "lora_trainable",
    ]  # fmt: skip


@pytest.mark.parametrize("targets", [("output",), ("feedforward",), ALL_TARGETS])
@pytest.mark.parametrize("freeze_base", [True, False])
@pytest.mark.parametrize("train_embeddings", [True, False])
@pytest.mark.parametrize("train_head", [True, False])
def test_the_groups_sum_to_the_total(
    targets: tuple[str, ...], freeze_base: bool, train_embeddings: bool, train_head: bool
):
    model = apply_lora_to_behrt(
        BEHRTForMaskedLM(TINY), 4, targets=targets, freeze_base=freeze_base, train_embeddings=train_embeddings,
        train_head=train_head,
    )  # fmt: skip
    counts = dict(count_parameters(model))
    groups = ("embeddings", "encoder", "head", "lora")
    assert sum(counts[group] for group in groups) == counts["total"]
    assert sum(counts[f"{group}_trainable"] for group in groups) == counts["trainable"]
    assert counts["trainable"] + counts["frozen"] == counts["total"]
    assert counts["embeddings_trainable"] == counts["embeddings"] * train_embeddings
    assert counts["head_trainable"] == counts["head"] * train_head
    assert counts["lora_trainable"] == counts["lora"] > 0
    wrapped = sum(p.numel() for layer in adapted_layers(model).values() for p in layer.base.parameters())
    assert counts["encoder_trainable"] == (0 if freeze_base else counts["encoder"] - wrapped)


def test_a_frozen_base_keeps_its_norms_frozen():
    model = apply_lora_to_behrt(BEHRTForMaskedLM(TINY), 4)
    norms = [module for module in model.behrt.encoder.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5
    assert not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())


def test_trainability_goes_by_identity_and_not_by_name():
    class Deceptive(nn.Module):
        """Its encoder is called "head", its head "lora_embeddings"."""

        def __init__(self) -> None:
            super().__init__()
            self.head = BEHRT(TINY)
            self.lora_embeddings = nn.Linear(16, 2)

    model = apply_lora_to_behrt(Deceptive(), 4, train_embeddings=False, train_head=True)
    counts = count_parameters(model)
    assert counts["head"] == counts["head_trainable"] == 16 * 2 + 2
    assert counts["encoder_trainable"] == counts["embeddings_trainable"] == 0
    assert counts["lora"] == 8 * 2 * 4 * 16


def test_shared_parameters_count_once():
    model = BEHRTForMaskedLM(TINY)
    before = count_parameters(model)["total"]
    model.behrt.encoder.layers[1].attention = model.behrt.encoder.layers[0].attention
    assert count_parameters(model)["total"] == before - 4 * (16 * 16 + 16)


def test_set_trainable_serves_full_training_too_and_can_be_changed_again():
    model = BEHRTForMaskedLM(TINY)
    set_trainable(model, train_head=False)
    assert count_parameters(model)["frozen"] == count_parameters(model)["head"]
    set_trainable(model, freeze_base=True, train_embeddings=False)
    assert count_parameters(model)["trainable"] == count_parameters(model)["head"]
    set_trainable(model)
    assert count_parameters(model)["frozen"] == 0


def test_a_merged_model_can_be_trained_whole():
    model = merge_adapters(apply_lora_to_behrt(BEHRTForMaskedLM(TINY), 4))
    set_trainable(model)
    counts = count_parameters(model)
    assert (counts["lora"], counts["frozen"]) == (0, 0)


def test_a_model_without_an_encoder_of_ours_is_refused():
    with pytest.raises(UserError, match="Linear: expected a BEHRT, or a model with one inside; found 0"):
        parameter_groups(nn.Linear(2, 2))
    with pytest.raises(UserError, match="Linear"):
        apply_lora_to_behrt(nn.Linear(2, 2))


# Adapters that do not act


class ReadsTheWeight(nn.Module):
    """What `nn.MultiheadAttention` does with `out_proj`: the layer is never called, its weight is read."""

    def __init__(self, layer: LoRALinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.base.weight, self.layer.base.bias)


@pytest.mark.parametrize("kind", [BEHRT, BEHRTForMaskedLM])
def test_every_adapter_acts(kind: type[nn.Module]):
    model = apply_lora_to_behrt(kind(TINY), 4, targets=ALL_TARGETS)
    assert silent_adapters(model, BATCH) == []


def test_every_adapter_acts_at_scored_tokens_of_packed_rows():
    model = apply_lora_to_behrt(BEHRTForMaskedLM(TINY), 4, targets=ALL_TARGETS)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, -1]])
    assert silent_adapters(model, {**BATCH, "segments": segments, "scored": BATCH["codes"] == 9}) == []


def test_an_adapter_whose_layer_is_read_and_not_called_is_found_though_its_counts_are_perfect():
    model = apply_lora_to_behrt(BEHRTForMaskedLM(TINY), 4, targets=("output",))
    counts = count_parameters(model)
    attention = model.behrt.encoder.layers[1].attention
    attention.output = ReadsTheWeight(attention.output)
    assert count_parameters(model) == counts
    assert silent_adapters(model, BATCH) == ["behrt.encoder.layers.1.attention.output.layer"]


def test_an_adapter_without_gradient_is_found():
    model = apply_lora_to_behrt(BEHRTForMaskedLM(TINY), 4, targets=("query", "value"))
    first, second, third, _ = adapted_layers(model)
    adapted_layers(model)[first].lora.B.requires_grad_(False)
    model.get_submodule(second).register_forward_hook(lambda module, inputs, output: output.detach())
    assert silent_adapters(model, BATCH) == [first, second]
    assert third not in silent_adapters(model, BATCH)


def test_an_adapter_that_learns_but_changes_nothing_is_found():
    model = apply_lora_to_behrt(BEHRTForMaskedLM(TINY), 4, targets=("value",))
    first, _ = adapted_layers(model)
    # A gradient flows through the difference of the output and its own copy, which is always zero.
    model.get_submodule(first).lora.register_forward_hook(lambda module, inputs, output: output - output.detach())
    assert silent_adapters(model, BATCH) == [first]


def test_all_adapters_are_silent_where_all_of_them_are_frozen():
    model = apply_lora_to_behrt(BEHRTForMaskedLM(TINY), 4)
    for layer in adapted_layers(model).values():
        layer.lora.requires_grad_(False)
    assert silent_adapters(model, BATCH) == list(adapted_layers(model))


@pytest.mark.parametrize("failing", [False, True])
def test_looking_for_silent_adapters_leaves_no_trace(failing: bool):
    model = apply_lora_to_behrt(BEHRTForMaskedLM(TINY), 4, dropout=0.3).train()
    model.behrt.encoder.layers[0].eval()  # a mixture of modes has to come back as it was
    model(**BATCH).sum().backward()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    if failing:
        with pytest.raises(TypeError):
            silent_adapters(model, {**BATCH, "surprise": BATCH["codes"]})
    else:
        silent_adapters(model, BATCH)
    assert torch.equal(random_state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        before = gradients[name]
        assert parameter.grad is None if before is None else torch.equal(parameter.grad, before)
