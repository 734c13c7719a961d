"""Do adapters compute, merge, save and load what LoRA (and PEFT) say they should?"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from behrt.adapter_files import frozen_sha256, load_adapter, save_adapter, sha256_of
from behrt.config import BEHRTConfig, UserError
from behrt.lora import LoRALinear, adapted_layers, insert_adapters, merge_adapters
from behrt.model import BEHRT, BEHRTForMaskedLM
from behrt.parameters import apply_lora_to_behrt

TINY = BEHRTConfig(
    vocab_size=50, embedding_dim=12, hidden_dim=16, num_layers=2, num_heads=4, feedforward_dim=32, max_position=12
)
ALL_TARGETS = ("query", "key", "value", "output", "feedforward")

ADAPTATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "all layers": {"targets": ALL_TARGETS, "alpha": 5.0, "rank": 3},
    "adapters only": {"train_embeddings": False, "train_head": False},
    "head only": {"train_embeddings": False},
    "base not frozen": {"targets": ("output",), "freeze_base": False},
    "base not frozen, feed-forward": {"targets": ("feedforward",), "freeze_base": False, "train_head": False},
}
each_adaptation = pytest.mark.parametrize("options", ADAPTATIONS.values(), ids=ADAPTATIONS.keys())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(layer: LoRALinear, std: float = 1.0) -> LoRALinear:
    """Its adapter with values; a layer by itself leaves A as memory happens to be: `insert_adapters` draws it."""
    nn.init.normal_(layer.lora.A, std=std, generator=seeded())
    nn.init.normal_(layer.lora.B, std=std, generator=seeded(1))
    return layer


def plain(kind: Callable[..., nn.Module] = BEHRTForMaskedLM, config: BEHRTConfig = TINY, seed: int = 0) -> nn.Module:
    return kind(config, generator=seeded(seed)).eval()


def trained(model: nn.Module, **options: Any) -> nn.Module:
    """The model with adapters, and every trained parameter moved away from where it began, as by training."""
    apply_lora_to_behrt(model, **{"rank": 4, **options}, generator=seeded(1))
    draws = seeded(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return model


def histories(vocab_size: int = 50) -> dict[str, torch.Tensor]:
    draws = seeded(9)
    return {
        "codes": torch.randint(5, vocab_size, (3, 10), generator=draws),
        "ages": 110 * torch.rand(3, 10, generator=draws),
        "visits": torch.randint(0, 9, (3, 10), generator=draws),
        "attention_mask": torch.arange(10) < torch.tensor([[10], [7], [4]]),
    }


def logits(model: nn.Module, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model.eval()(**(batch or histories()))
    return output


def test_a_fresh_adapter_changes_no_output():
    model = plain()
    before = logits(model)
    insert_adapters(model, 4, targets=ALL_TARGETS)
    assert len(adapted_layers(model)) == 12
    assert torch.equal(logits(model), before)


def test_an_adapter_adds_its_scaled_product():
    layer = drawn(LoRALinear(nn.Linear(6, 4), rank=2, alpha=3.0))
    x = torch.randn(5, 6, generator=seeded(2))
    expected = x @ layer.base.weight.T + layer.base.bias + 1.5 * x @ layer.lora.A.T @ layer.lora.B.T
    torch.testing.assert_close(layer(x), expected)


def test_alpha_is_twice_the_rank_unless_given():
    model, given = plain(), plain()
    insert_adapters(model, 4)
    insert_adapters(given, 4, alpha=1.0)
    assert {layer.lora.scaling for layer in adapted_layers(model).values()} == {2.0}
    assert {layer.lora.scaling for layer in adapted_layers(given).values()} == {0.25}


def test_dropout_is_on_the_adapters_input_and_in_training_only():
    layer = LoRALinear(nn.Linear(6, 4), rank=2, alpha=2.0, dropout=0.5)
    nn.init.ones_(layer.lora.A)
    nn.init.ones_(layer.lora.B)
    x = torch.ones(2_000, 6)
    added = (layer.train()(x) - layer.base(x))[:, 0].detach()
    # Six inputs, each kept with probability 1/2 and then doubled, go through two ranks of ones: 4 · Binomial(6, 1/2).
    assert {round(value) for value in added.tolist()} == {0, 4, 8, 12, 16, 20, 24}
    assert added.mean().item() == pytest.approx(12, abs=0.5)
    torch.testing.assert_close(layer.eval()(x), layer.base(x) + 12)


@pytest.mark.parametrize("leading", [(7,), (2, 3)])
def test_gradients_are_those_of_base_and_adapter_side_by_side(leading: tuple[int, ...]):
    layer = drawn(LoRALinear(nn.Linear(6, 4), rank=2, alpha=3.0)).double()
    layer.base.requires_grad_(False)
    x = torch.randn(*leading, 6, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    beside = layer.base(x) + 1.5 * x @ layer.lora.A.T @ layer.lora.B.T
    direction = torch.randn(beside.shape, dtype=torch.float64, generator=seeded(2))
    wanted = [x, layer.lora.A, layer.lora.B]
    expected = torch.autograd.grad((beside * direction).sum(), wanted)
    torch.testing.assert_close(torch.autograd.grad((layer(x) * direction).sum(), wanted), expected)


def test_in_lower_precision_base_and_adapter_are_summed_before_they_are_rounded():
    layer = drawn(LoRALinear(nn.Linear(64, 64, bias=False), rank=4, alpha=8.0), std=0.1)
    layer.base.requires_grad_(False)
    weight = (layer.base.weight + 2 * layer.lora.B @ layer.lora.A).bfloat16()
    x = torch.eye(64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), weight.T)


@pytest.mark.parametrize("training", [True, False])
def test_adapters_take_the_mode_of_the_layers_they_sit_on(training: bool):
    model = plain().train(training)
    insert_adapters(model, 4, dropout=0.5)
    assert {module.training for module in model.modules()} == {training}


def test_a_layer_with_an_adapter_has_no_weight_to_be_read_past_it():
    layer = LoRALinear(nn.Linear(6, 4), rank=2, alpha=2.0)
    with pytest.raises(AttributeError, match="weight"):
        _ = layer.weight


def test_an_optimizer_step_moves_the_adapters_and_leaves_the_base():
    model = apply_lora_to_behrt(plain(), rank=4, train_embeddings=False, train_head=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    model.train()(**histories()).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"{name}.lora.B" for name in adapted_layers(model)}  # A's gradient is 0 while B is


def test_adapters_draw_from_the_given_generator_only():
    before = torch.get_rng_state()
    one, two = plain(), plain()
    insert_adapters(one, 4, generator=seeded(3))
    insert_adapters(two, 4, generator=seeded(3))
    assert torch.equal(before, torch.get_rng_state())
    assert sha256_of(one.state_dict()) == sha256_of(two.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "--lora-rank 0: expected 1 to 16"),
        ({"rank": -1}, "--lora-rank -1: expected 1 to 16"),
        ({"rank": 17}, "--lora-rank 17: expected 1 to 16"),
        (
            {"rank": 17, "targets": ("feedforward",)},
            r"--lora-rank 17: expected 1 to 16, the width of .*feedforward\.up",
        ),
        ({"alpha": 0.0}, "--lora-alpha 0: expected a number above 0"),
        ({"alpha": float("nan")}, "--lora-alpha nan"),
        ({"dropout": 1.0}, "--lora-dropout 1"),
        ({"targets": ("query", "quary")}, "--lora-targets: 'quary' matches no linear layer.*; did you mean 'query'?"),
        ({"targets": ("decoder",)}, "--lora-targets: 'decoder' matches no linear layer"),
        ({"targets": ()}, "--lora-targets: none given"),
    ],
)
def test_a_value_out_of_range_is_refused_and_the_model_left_as_it_was(options: dict[str, Any], message: str):
    model = plain()
    with pytest.raises(UserError, match=message) as error:
        apply_lora_to_behrt(model, **options)
    assert "\n" not in str(error.value)
    assert not adapted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_target_that_is_known_but_missing_in_the_encoder_is_refused():
    model = plain()
    for layer in model.behrt.encoder.layers:
        layer.attention.output = nn.Identity()
    with pytest.raises(UserError, match="'output' matches no linear layer"):
        apply_lora_to_behrt(model, rank=4)


def test_adapters_are_not_put_on_twice():
    model = apply_lora_to_behrt(plain(), rank=4)
    with pytest.raises(UserError, match="has 8 adapters already"):
        apply_lora_to_behrt(model, rank=4)


# Merging


def test_merging_changes_no_output():
    model = trained(plain(config=BEHRTConfig.small(vocab_size=200)), targets=ALL_TARGETS, rank=8)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora.B *= 0.1  # about what training leaves; outputs stay of the order of 1
    batch = histories(200)
    before, plain_names = logits(model.behrt, batch), set(plain(config=model.config).state_dict())
    assert merge_adapters(model) is model
    assert set(model.state_dict()) == plain_names
    assert not adapted_layers(model)
    assert (logits(model.behrt, batch) - before)[batch["attention_mask"]].abs().max() < 1e-6 * before.abs().max()
    assert (before - logits(plain(config=model.config).behrt, batch)).abs().max() > 0.1  # they did something


# Against PEFT


def into_peft(model: nn.Module, base: nn.Module) -> nn.Module:
    """PEFT's own LoRA on a plain base, with the A and B of ours."""
    layers = adapted_layers(model)
    lora = next(iter(layers.values())).lora
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=sorted({name.rpartition(".")[2] for name in layers})
    )
    theirs = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, layer in layers.items():
            their_layer = theirs.base_model.model.get_submodule(name)
            their_layer.lora_A["default"].weight.copy_(layer.lora.A)
            their_layer.lora_B["default"].weight.copy_(layer.lora.B)
    return theirs


def test_outputs_equal_pefts():
    model = trained(plain(), targets=ALL_TARGETS, alpha=5.0, train_embeddings=False, train_head=False)
    torch.testing.assert_close(logits(model), logits(into_peft(model, plain())), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(model), logits(plain()), rtol=0, atol=1e-3)


def test_merged_weights_equal_pefts():
    model = trained(plain(), targets=ALL_TARGETS, alpha=5.0, train_embeddings=False, train_head=False)
    theirs = into_peft(model, plain()).merge_and_unload().state_dict()
    ours = merge_adapters(model).state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6)


@each_adaptation
@pytest.mark.parametrize("kind", [BEHRT, BEHRTForMaskedLM])
def test_peft_loads_our_adapter_and_gives_the_same_outputs(
    kind: Callable[..., nn.Module], options: dict[str, Any], tmp_path: Path
):
    model = trained(plain(kind), **options)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain(kind), str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)


def test_we_load_an_adapter_that_peft_wrote(tmp_path: Path):
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["query", "up", "down"], modules_to_save=["head"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(plain(), config)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_adapter(plain(), tmp_path)), logits(theirs), rtol=0, atol=1e-6)


def test_a_peft_option_that_we_do_not_compute_is_refused(tmp_path: Path):
    config = peft.LoraConfig(r=3, target_modules=["query"], use_rslora=True)
    peft.get_peft_model(plain(), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="option use_rslora is not supported"):
        load_adapter(plain(), tmp_path)


# Saving and loading


@each_adaptation
@pytest.mark.parametrize("kind", [BEHRT, BEHRTForMaskedLM])
def test_a_saved_adapter_gives_back_outputs_and_trainability_bit_for_bit(
    kind: Callable[..., nn.Module], options: dict[str, Any], tmp_path: Path
):
    model = trained(plain(kind), **options)
    save_adapter(model, tmp_path)
    loaded = load_adapter(plain(kind), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    save_adapter(loaded, tmp_path / "again")
    assert (tmp_path / "adapter_config.json").read_text() == (tmp_path / "again" / "adapter_config.json").read_text()
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert sha256_of(first) == sha256_of(again)


@each_adaptation
def test_an_adapter_holds_all_that_is_trained_and_nothing_that_is_frozen(options: dict[str, Any], tmp_path: Path):
    model = trained(plain(), **options)
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )


def test_loading_disturbs_no_random_state(tmp_path: Path):
    save_adapter(trained(plain()), tmp_path)
    base = plain()
    before = torch.get_rng_state()
    load_adapter(base, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_the_header_keeps_the_hash_of_what_is_frozen(tmp_path: Path):
    model = trained(plain())
    save_adapter(model, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as handle:
        kept = handle.metadata()["frozen_sha256"]
    assert kept == frozen_sha256(model)
    with torch.no_grad():
        model.behrt.encoder.norm.weight[0] += 1e-6
    assert kept != frozen_sha256(model)


def refused(base: nn.Module, folder: Path, match: str) -> None:
    """Loading raises one line that names the folder, and leaves the model as it was."""
    before = sha256_of(base.state_dict())
    with pytest.raises(UserError, match=match) as error:
        load_adapter(base, folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert sha256_of(base.state_dict()) == before
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_an_adapter_is_refused_by_another_base(tmp_path: Path):
    save_adapter(trained(plain()), tmp_path)
    refused(plain(seed=1), tmp_path, "over other frozen weights")


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"hidden_dim": 20}, "has shape .* the model expects"),
        ({"num_layers": 3}, "tensors are missing"),
        ({"num_layers": 1}, "tensors fit nowhere"),
        ({"vocab_size": 51}, r"codes.weight has shape \(50, 12\), the model expects \(51, 12\)"),
    ],
)
def test_an_adapter_is_refused_by_a_model_of_another_shape(other: dict[str, int], match: str, tmp_path: Path):
    save_adapter(trained(plain()), tmp_path)
    refused(plain(config=BEHRTConfig(**{**TINY.to_dict(), **other})), tmp_path, match)


def test_an_adapter_is_refused_by_a_model_that_has_one(tmp_path: Path):
    save_adapter(trained(plain()), tmp_path)
    with pytest.raises(UserError, match="expected a plain model to load into, found one with 8 adapters"):
        load_adapter(trained(plain()), tmp_path)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_header(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: cannot be read"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "only safetensors files are loaded"),
    "pickled weights": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "only safetensors files are loaded",
    ),
    "half a configuration": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LO'), "not valid JSON"),
    "not an object": (lambda f: (f / "adapter_config.json").write_text("[1]"), "peft_type LORA"),
    "half the weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:999]),
        "not a whole safetensors file",
    ),
    "empty weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    "another save's configuration": (lambda f: change_config(f, lora_alpha=9.0), "not from the same save"),
    "no rank": (lambda f: change_config(f, r=None), "r is missing or of the wrong type"),
    "a negative alpha": (
        lambda f: (change_config(f, lora_alpha=-1.0), without_header(f)),
        "adapter_config.json: --lora-alpha -1",
    ),
    "another rank": (lambda f: (change_config(f, r=5), without_header(f)), "has shape"),
    "up without down": (
        lambda f: (change_config(f, target_modules=["query", "up"]), without_header(f)),
        "up only with down",
    ),
    "a layer of another model": (
        lambda f: (change_config(f, target_modules=["q_proj"]), without_header(f)),
        "target_modules: expected some of query",
    ),
}


@pytest.mark.parametrize(("damage", "match"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_adapter_is_refused_in_one_line(damage: Callable[[Path], Any], match: str, tmp_path: Path):
    folder = tmp_path / "adapter"
    save_adapter(trained(plain()), folder)
    damage(folder)
    refused(plain(), folder, match)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    refused(plain(), tmp_path / "nowhere", r"No such file or directory; expected the folder of a saved adapter")


def test_a_save_that_fails_leaves_the_earlier_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = trained(plain())
    save_adapter(model, tmp_path)
    expected = logits(model)
    later = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(adapted_layers(later).values())).lora.B += 1

    def full_disk(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match="the adapter cannot be written: No space left on device"):
        save_adapter(later, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(logits(load_adapter(plain(), tmp_path)), expected)
