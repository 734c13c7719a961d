"""Does the look at the first batch find every broken model, no sound one, and leave nothing changed?"""

import math
import random
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from behrt.attention import PatientGroups
from behrt.batches import IGNORED, MaskedSequences, PackedBatch, TrainingBatches, cut, gather
from behrt.cheap_layers import Linear
from behrt.config import AdaptationSettings, BEHRTConfig, TrainingSettings
from behrt.devices import is_out_of_memory
from behrt.doctor import memory, preflight
from behrt.doctor.masks import masks_change, selected_tokens
from behrt.doctor.memory import (
    Keeping,
    Kept,
    control_group_room,
    free_memory,
    memory_available,
    memory_needed,
)
from behrt.doctor.preflight import Load, StepPass, epoch_seconds, gradient_pass, one_patient, one_row, probe
from behrt.lora import LoRALinear, adapted_layers
from behrt.masking import mask_tokens
from behrt.model import BEHRTForMaskedLM, FeedForward
from behrt.parameters import apply_lora_to_behrt, count_parameters, set_trainable
from behrt.pretrain import masked_lm_loss
from behrt.trainer import LossSums, Trainer, make_optimizer
from behrt.vocabulary import CLS, FIRST_CODE, SEP

CPU = torch.device("cpu")
VOCABULARY = 50
TINY = BEHRTConfig(
    vocab_size=VOCABULARY, embedding_dim=12, hidden_dim=16, num_layers=2, num_heads=4, feedforward_dim=32
)
ALL_TARGETS = ("query", "key", "value", "output", "feedforward")


class Patients:
    """Made-up training patients in memory, in the place of a `PreparedSplit`; from 1 to `codes` codes each."""

    def __init__(self, count: int, codes: int = 12, seed: int = 0, code: int | None = None) -> None:
        draws = np.random.default_rng(seed)
        self.patients = []
        for _ in range(count):
            tokens, ages, visits = [CLS], [0.0], [0]
            for visit in range(1, int(draws.integers(1, 4)) + 1 if codes > 1 else 2):
                number = int(draws.integers(1, max(2, codes // 3 + 1)))
                drawn = draws.integers(FIRST_CODE, VOCABULARY, number).tolist() if code is None else [code] * number
                tokens += [*drawn, SEP]
                ages += [float(draws.uniform(20, 90))] * (number + 1)
                visits += [visit] * (number + 1)
            ages[0] = ages[1]
            self.patients.append(
                (np.array(tokens, np.int32), np.array(ages, np.float32), np.array(visits, np.int32))
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.patients)

    def sequence(self, patient: int) -> tuple[np.ndarray, ...]:
        return self.patients[patient]


def batches(count: int = 60, *, seed: int = 0, batch_size: int = 16, **options: Any) -> TrainingBatches:
    """The training steps of made-up patients."""
    accumulation, share = options.pop("accumulation_steps", 1), options.pop("mlm_probability", 0.15)
    return TrainingBatches(
        Patients(count, **options),  # type: ignore[arg-type]
        np.arange(count), batch_size=batch_size, accumulation_steps=accumulation, max_position=TINY.max_position,
        row_length=64, vocab_size=VOCABULARY, seed=seed, mlm_probability=share,
    )  # fmt: skip


class Steps:
    """Steps written down, the same in every epoch unless given by epoch."""

    def __init__(self, *epochs: list[list[PackedBatch]]) -> None:
        self.epochs = epochs
        self.steps_per_epoch = len(epochs[0])

    def epoch(
        self, epoch: int, first_step: int = 0, *, accumulation_steps: int | None = None
    ) -> Iterator[list[PackedBatch]]:
        yield from self.epochs[min(epoch, len(self.epochs)) - 1][first_step:]


def model(**lora: Any) -> BEHRTForMaskedLM:
    """A tiny model; with options, adapters on it."""
    made = BEHRTForMaskedLM(TINY, generator=torch.Generator().manual_seed(1))
    options = {"rank": 4, "generator": torch.Generator().manual_seed(2), **lora}
    return apply_lora_to_behrt(made, **options) if lora else made


def adaptation(*targets: str) -> AdaptationSettings:
    return AdaptationSettings(use_lora=True, lora_targets=targets) if targets else AdaptationSettings()


def look(looked_at: nn.Module, steps: Any = None, *targets: str, **options: Any) -> dict[str, Any]:
    steps = steps or batches()
    evaluated = next(iter(steps.epoch(1)))
    return probe(
        looked_at, options.pop("loss", masked_lm_loss), steps=steps, train_evaluation=evaluated, validation=evaluated,
        adaptation=adaptation(*targets), device=CPU, **options,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over the first step, since no test reads its time from several."""
    monkeypatch.setattr(preflight, "SECONDS_TIMED", 0)


# A sound model has nothing to be found


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        ((), {}),
        (("output",), {}),
        (ALL_TARGETS, {}),
        (ALL_TARGETS, {"freeze_base": False}),
        (("query", "key"), {"train_embeddings": False, "train_head": False, "dropout": 0.3}),
    ],
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_sound_model_has_no_finding(targets: tuple[str, ...], options: dict, precision: torch.dtype) -> None:
    sound = model(targets=targets, **options) if targets else model()
    for seed in range(3):
        facts = look(sound, batches(seed=seed), *targets, precision=precision)
        assert facts["without_gradient"] == facts["silent_adapters"] == facts["gradient_not_finite"] == ()
        assert (facts["missing_adapters"], facts["misplaced_adapters"]) == (0, ())
        assert facts["out_of_memory"] is None
        assert facts["training_masks_change"] is True


@pytest.mark.parametrize("targets", [(), ALL_TARGETS])
@pytest.mark.parametrize(("patients", "codes"), [(1, 1), (1, 12), (3, 1)])
def test_a_sound_model_on_a_handful_of_tokens_has_no_finding(targets: tuple[str, ...], patients: int, codes: int):
    sound = model(targets=targets, freeze_base=False) if targets else model()
    seen = 0
    for seed in range(12):
        facts = look(sound, batches(patients, seed=seed, codes=codes, batch_size=1), *targets)
        seen += "without_gradient" in facts
        assert not facts.get("without_gradient")
        assert not facts.get("silent_adapters")
    assert seen >= 11  # in 20 epochs one code is selected in 96% of the cohorts


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_model_that_has_trained_has_no_finding(use_lora: bool) -> None:
    targets = ALL_TARGETS if use_lora else ()
    sound, steps = (model(targets=targets) if use_lora else model()), batches()
    evaluated = next(iter(steps.epoch(1)))
    settings = TrainingSettings(epochs=5, lr=0.01, early_stopping_patience=0)
    list(Trainer(sound, masked_lm_loss, steps=steps, train_evaluation=evaluated, validation=evaluated,
                 settings=settings, device=CPU).epochs())  # fmt: skip
    facts = look(sound, steps, *targets)
    assert facts["without_gradient"] == facts["silent_adapters"] == ()


@pytest.mark.parametrize("size", ["small", "medium"])
def test_no_size_has_a_finding(size: str) -> None:
    config = BEHRTConfig.of_size(size, vocab_size=VOCABULARY)
    sound = apply_lora_to_behrt(BEHRTForMaskedLM(config), 8, targets=ALL_TARGETS, freeze_base=False)
    facts = look(sound, batches(8), *ALL_TARGETS)
    assert facts["without_gradient"] == facts["silent_adapters"] == ()
    assert facts["missing_adapters"] == 0
    assert len(facts["adapted_layers"]) == 6 * config.num_layers


def test_the_first_loss_is_that_of_the_first_step_without_dropout_and_near_chance() -> None:
    fresh, steps = model(), batches(accumulation_steps=3)
    first = next(iter(steps.epoch(1)))
    trainer = Trainer(fresh, masked_lm_loss, steps=steps, train_evaluation=first, validation=first,
                      settings=TrainingSettings(), device=CPU)  # fmt: skip
    facts = look(fresh.train(), steps)
    assert facts["first_loss"] == pytest.approx(trainer.evaluate(first).loss, rel=1e-5)
    assert facts["first_loss"] == pytest.approx(math.log(VOCABULARY), rel=0.03)


def test_counts_and_steps_are_those_of_the_run() -> None:
    adapted = model(targets=("value",))
    facts, counts = look(adapted, None, "value"), count_parameters(adapted)
    assert facts["total_parameters"] == counts["total"]
    assert facts["trainable_parameters"] == counts["trainable"]
    assert facts["lora_parameters"] == counts["lora"]
    assert facts["steps_per_epoch"] == 4
    assert facts["adapted_layers"] == tuple(adapted_layers(adapted))


# Parameters that no gradient reaches


def test_embeddings_that_are_cut_off_are_found_and_nothing_else() -> None:
    broken = model()
    broken.behrt.embeddings.register_forward_hook(lambda module, inputs, output: output.detach())
    expected = tuple(f"behrt.embeddings.{name}" for name, _ in broken.behrt.embeddings.named_parameters())
    assert look(broken)["without_gradient"] == expected
    set_trainable(broken, train_embeddings=False)  # what is frozen needs none
    assert look(broken)["without_gradient"] == ()


def test_a_gradient_that_is_zero_everywhere_is_found() -> None:
    broken = model()
    broken.behrt.encoder.layers[1].feedforward.register_forward_hook(lambda module, inputs, output: 0 * output)
    layer = "behrt.encoder.layers.1"
    inside = [f"feedforward.{name}" for name, _ in FeedForward(TINY).named_parameters()]
    norm = ["feedforward_norm.weight", "feedforward_norm.bias"]
    assert look(broken)["without_gradient"] == tuple(f"{layer}.{name}" for name in [*norm, *inside])


def test_a_loss_that_depends_on_nothing_leaves_every_parameter_without_gradient() -> None:
    def deaf(looked_at: nn.Module, batch: PackedBatch) -> LossSums:
        sums = masked_lm_loss(looked_at, batch)
        return LossSums(sums.loss.detach(), sums.correct)

    cut_off = model()
    assert look(cut_off, loss=deaf)["without_gradient"] == tuple(name for name, _ in cut_off.named_parameters())


def test_a_parameter_that_only_the_second_micro_batch_reaches_is_not_reported() -> None:
    first, second = next(iter(batches(accumulation_steps=2).epoch(1)))
    nothing_scored = replace(first, labels=torch.full_like(first.labels, IGNORED))
    assert look(model(), Steps([[nothing_scored, second]]))["without_gradient"] == ()
    assert look(model(), Steps([[second, nothing_scored]]))["without_gradient"] == ()


def test_a_first_factor_is_excused_only_while_its_second_is_zero_and_trained() -> None:
    fresh = model(targets=("value",))
    first, second = adapted_layers(fresh)
    assert look(fresh, None, "value")["without_gradient"] == ()
    fresh.get_submodule(first).lora.B.requires_grad_(False)  # zero for ever, and A with it
    assert look(fresh, None, "value")["without_gradient"] == (f"{first}.lora.A",)
    fresh.get_submodule(second).lora.B.data.normal_()
    fresh.get_submodule(second).lora.register_forward_hook(lambda module, inputs, output: 0 * output)
    names = (f"{first}.lora.A", f"{second}.lora.A", f"{second}.lora.B")
    assert look(fresh, None, "value")["without_gradient"] == names


@pytest.mark.parametrize("adapted", [False, True])
def test_the_bias_of_a_key_projection_is_excused_and_that_of_a_query_is_not(adapted: bool) -> None:
    sound = model(targets=("key", "query")) if adapted else model()
    targets = ("key", "query") if adapted else ()
    for projection in ("key", "query"):
        layer = getattr(sound.behrt.encoder.layers[0].attention, projection)
        bias = (layer.base if adapted else layer).bias
        bias.requires_grad_(True).register_hook(torch.zeros_like)
    name = f"behrt.encoder.layers.0.attention.query{'.base' if adapted else ''}.bias"
    assert look(sound, None, *targets)["without_gradient"] == (name,)


def test_the_bias_of_a_key_that_is_never_used_is_found() -> None:
    broken = model()
    broken.behrt.encoder.layers[0].attention.key.register_forward_hook(lambda module, inputs, output: output.detach())
    key = "behrt.encoder.layers.0.attention.key"
    assert look(broken)["without_gradient"] == (f"{key}.weight", f"{key}.bias")


def test_gradients_that_are_not_finite_are_named_and_count_as_gradients() -> None:
    broken = model()
    with torch.no_grad():
        broken.head.norm.weight[3] = math.nan
    facts = look(broken)
    assert math.isnan(facts["first_loss"])
    assert "head.dense.weight" in facts["gradient_not_finite"]
    assert facts["without_gradient"] == ()


def test_nothing_is_said_of_gradients_where_the_loss_is_zero() -> None:
    def learned(looked_at: nn.Module, batch: PackedBatch) -> LossSums:
        sums = masked_lm_loss(looked_at, batch)
        return LossSums(0 * sums.loss, sums.correct)

    assert look(model(), loss=learned)["without_gradient"] == ()


def test_the_first_step_that_scores_a_token_stands_for_one_that_scores_none() -> None:
    (step,) = batches(10).epoch(1)
    unscored = [replace(batch, labels=torch.full_like(batch.labels, IGNORED)) for batch in step]
    assert look(model(), Steps([unscored], [unscored], [step]))["without_gradient"] == ()
    facts = look(model(), Steps([unscored]))
    assert "without_gradient" not in facts
    assert facts["total_parameters"]


# Adapters


class GuidesAttention(nn.Module):
    """The guide's own: an adapter on `nn.MultiheadAttention.out_proj`, whose weight is read and which is not called."""

    class Wrapped(LoRALinear):
        @property
        def weight(self) -> Tensor:
            return self.base.weight

        @property
        def bias(self) -> Tensor:
            return self.base.bias

    def __init__(self, config: BEHRTConfig, rank: int) -> None:
        super().__init__()
        self.output = nn.MultiheadAttention(config.hidden_dim, config.num_heads, batch_first=True)
        self.output.out_proj = self.Wrapped(self.output.out_proj, rank, 2.0 * rank)  # type: ignore[assignment]
        nn.init.normal_(self.output.out_proj.lora.A)

    def forward(self, hidden: Tensor, groups: PatientGroups, asking: Tensor | None = None) -> Tensor:
        patients = torch.arange(len(groups.counts)).repeat_interleave(groups.counts)
        banned = patients[:, None] != patients
        asking = torch.arange(len(hidden)) if asking is None else asking
        return self.output(hidden[asking], hidden, hidden, attn_mask=banned[asking], need_weights=False)[0]


def test_the_guides_own_adapters_are_silent_though_their_counts_are_perfect() -> None:
    sound, bypassed = model(targets=("output",)), model()
    for layer in bypassed.behrt.encoder.layers:
        layer.attention = GuidesAttention(TINY, rank=4)
    bypassed.requires_grad_(False)
    for part in (bypassed.behrt.embeddings, bypassed.head, *(a.lora for a in adapted_layers(bypassed).values())):
        part.requires_grad_(True)
    assert count_parameters(bypassed) == count_parameters(sound)
    facts, control = look(bypassed, None, "output"), look(sound, None, "output")
    assert facts["silent_adapters"] == facts["adapted_layers"] == tuple(adapted_layers(bypassed))
    assert facts["without_gradient"] == tuple(
        f"{name}.lora.{factor}" for name in adapted_layers(bypassed) for factor in "AB"
    )
    assert control["silent_adapters"] == control["without_gradient"] == ()
    assert (facts["missing_adapters"], facts["misplaced_adapters"]) == (0, ())


def test_an_adapter_whose_weight_is_read_in_one_layer_only_is_found() -> None:
    class Reads(nn.Module):
        def __init__(self, layer: LoRALinear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.layer.base.weight, self.layer.base.bias)

    broken = model(targets=ALL_TARGETS)
    attention = broken.behrt.encoder.layers[1].attention
    attention.output = Reads(attention.output)
    facts = look(broken, None, *ALL_TARGETS)
    assert facts["silent_adapters"] == ("behrt.encoder.layers.1.attention.output.layer",)
    assert (facts["missing_adapters"], facts["misplaced_adapters"]) == (0, ())


def test_layers_asked_for_that_have_no_adapter_are_counted() -> None:
    adapted = model(targets=("query", "feedforward"))
    assert look(adapted, None, "query", "feedforward")["missing_adapters"] == 0
    assert look(adapted, None, *ALL_TARGETS)["missing_adapters"] == 6
    assert look(adapted, None, "value")["missing_adapters"] == 2  # on other layers than asked, yet on known ones
    assert look(adapted, None, "value")["misplaced_adapters"] == ()
    assert look(model())["missing_adapters"] == 0


def test_adapters_outside_attention_and_feed_forward_are_misplaced() -> None:
    adapted = model(targets=("value",))
    adapted.head.dense = LoRALinear(adapted.head.dense, 2, 4.0)
    adapted.behrt.embeddings.projection = LoRALinear(adapted.behrt.embeddings.projection, 2, 4.0)
    adapted.behrt.encoder.layers[1].gate = LoRALinear(nn.Linear(16, 16), 2, 4.0)
    adapted.head.output = LoRALinear(nn.Linear(16, 16), 2, 4.0)  # a target's name, but not in the encoder
    misplaced = ("behrt.embeddings.projection", "behrt.encoder.layers.1.gate", "head.dense", "head.output")
    assert look(adapted, None, "value")["misplaced_adapters"] == misplaced


def test_the_row_that_stands_for_a_step_scores_a_token() -> None:
    (batch,) = next(iter(batches().epoch(1)))
    labels = batch.labels.clone()
    labels[0] = IGNORED
    unscored = replace(batch, labels=torch.full_like(labels, IGNORED))
    (row,) = one_row([unscored, replace(batch, labels=labels)])
    assert torch.equal(row.labels, labels[1:2])
    assert torch.equal(row.codes, batch.codes[1:2])


def test_adapters_are_tried_on_a_patient_of_two_tokens_or_more() -> None:
    batch = PackedBatch(
        codes=torch.tensor([[2, 0, 0], [2, 7, 3]]), ages=torch.full((2, 3), 50.0), visits=torch.zeros(2, 3).long(),
        positions=torch.zeros(2, 3).long(), segments=torch.tensor([[0, -1, -1], [0, 0, 0]]),
        labels=torch.full((2, 3), IGNORED),
    )  # fmt: skip
    chosen = one_patient([batch])
    assert chosen is not None
    assert chosen["codes"].tolist() == [[2, 7, 3]]
    assert one_patient([replace(batch, segments=batch.segments[:1])]) is None


# No trace


def fingerprint(looked_at: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything that the look must leave alone, as values that compare."""

    def bits(value: Tensor | None) -> bytes | None:
        return None if value is None else value.detach().numpy().tobytes()

    return [
        [(name, id(p), bits(p), bits(p.grad), p.requires_grad) for name, p in looked_at.named_parameters()],
        [bits(value) for value in looked_at.buffers()],
        [module.training for module in looked_at.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in looked_at.modules()],
        [bits(v) for state in optimizer.state.values() for v in state.values()],
        bits(torch.get_rng_state()), random.getstate(), repr(np.random.get_state()), torch.is_grad_enabled(),
    ]  # fmt: skip


def drawing(looked_at: nn.Module, batch: PackedBatch) -> LossSums:
    """A loss that draws from every global generator."""
    random.random()
    np.random.rand()
    torch.rand(1)
    return masked_lm_loss(looked_at, batch)


class Fails:
    """A loss that raises an error at a call, the first being 1."""

    def __init__(self, at: int, error: Exception) -> None:
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, looked_at: nn.Module, batch: PackedBatch) -> LossSums:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return drawing(looked_at, batch)


@pytest.mark.parametrize("failing_call", [None, 1, 2, 3])
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_the_look_leaves_no_trace(failing_call: int | None, grad_enabled: bool) -> None:
    adapted, steps = model(targets=ALL_TARGETS, dropout=0.2).train(), batches(accumulation_steps=2)
    adapted.behrt.encoder.layers[0].eval()  # a mixture of modes has to come back as it was
    optimizer = make_optimizer(adapted, TrainingSettings())
    masked_lm_loss(adapted, next(iter(steps.epoch(1)))[0]).loss.backward()
    optimizer.step()
    adapted.head.dense.bias.grad = None
    with torch.set_grad_enabled(grad_enabled):
        before = fingerprint(adapted, optimizer)
        if failing_call is None:
            assert look(adapted, steps, *ALL_TARGETS, loss=drawing)["without_gradient"] == ()
        else:
            with pytest.raises(ZeroDivisionError):
                look(adapted, steps, *ALL_TARGETS, loss=Fails(failing_call, ZeroDivisionError()))
        assert fingerprint(adapted, optimizer) == before


def test_a_training_is_the_same_bit_for_bit_after_a_look() -> None:
    def losses(looked_at_first: bool) -> list[float]:
        torch.manual_seed(0)
        trained, steps = model(targets=ALL_TARGETS), batches()
        if looked_at_first:
            look(trained, steps, *ALL_TARGETS)
        evaluated = next(iter(steps.epoch(1)))
        loop = Trainer(trained, masked_lm_loss, steps=steps, train_evaluation=evaluated, validation=evaluated,
                       settings=TrainingSettings(epochs=2), device=CPU)  # fmt: skip
        return [record.train_loss for record in loop.epochs()]

    assert losses(True) == losses(False)


# Memory


class LiveTensors(TorchDispatchMode):
    """An independent count: bytes of all tensors made inside, freed when their storage is."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (storage := value.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activations_are_those_that_live_at_the_peak_of_a_step(use_lora: bool, dropout: float) -> None:
    config = BEHRTConfig.small(vocab_size=VOCABULARY, dropout=dropout)
    trained = BEHRTForMaskedLM(config)
    if use_lora:
        apply_lora_to_behrt(trained, 8, dropout=dropout, targets=ALL_TARGETS, train_embeddings=False)
    (batch,) = next(iter(batches(200, batch_size=200).epoch(1)))
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    kept = gradient_pass(trained.eval(), masked_lm_loss, [batch], device=CPU, precision=torch.float32).kept
    with LiveTensors() as live:
        torch.autograd.grad(masked_lm_loss(trained.train(), batch).loss, parameters)
    estimate = kept.bytes + memory.TEMPORARIES * kept.largest
    assert live.peak / 1.25 < estimate < 1.25 * live.peak
    with torch.inference_mode(), LiveTensors() as live:
        masked_lm_loss(trained.eval(), batch)
    assert live.peak / 1.8 < memory.EVALUATION_TENSORS * kept.largest < 1.8 * live.peak


def test_what_is_kept_counts_every_storage_once_and_no_parameter() -> None:
    layer, inputs = nn.Linear(100, 300), torch.ones(7, 100, requires_grad=True)  # so that the weight is kept
    keeping = Keeping(layer)
    with keeping.watch():
        hidden = layer(inputs)
        (hidden.view(3, 700).sigmoid() * hidden.view(3, 700)).sum()
    # the input (weight gradient), the output (a factor), the sigmoid (a factor, and its own derivative)
    assert keeping.kept(7) == Kept(7, 4 * 7 * (100 + 300 + 300), 4 * 7 * 300)


def test_a_frozen_weight_in_lower_precision_is_held_and_not_kept_anew_by_every_batch() -> None:
    layer, inputs = Linear(100, 300), torch.ones(7, 100, requires_grad=True)
    layer.requires_grad_(False)
    keeping = Keeping(layer)
    held = memory_needed(layer, Kept(1, 0, 0), largest_size=1, largest_evaluated=1, device=torch.device("cuda"))
    with keeping.watch(), torch.autocast("cpu", torch.bfloat16):
        layer(inputs).sum()
    assert layer.frozen_cast is not None
    assert keeping.kept(7).bytes < layer.frozen_cast.nbytes
    grown = memory_needed(layer, Kept(1, 0, 0), largest_size=1, largest_evaluated=1, device=torch.device("cuda"))
    assert grown == held + layer.frozen_cast.nbytes


def test_memory_counts_weights_gradients_moments_and_the_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CPU_HEAP_SHARE", 1)
    monkeypatch.setattr(memory, "CPU_HEAP_BYTES", 0)
    layers = nn.Sequential(nn.Linear(9, 10), nn.Linear(10, 5))
    layers[0].requires_grad_(False)
    kept = Kept(size=10, bytes=1000, largest=100)
    needed = memory_needed(layers, kept, largest_size=30, largest_evaluated=30, device=CPU)
    assert needed == 4 * (100 + 55) + 4 * 4 * 55 + 3 * (1000 + 2 * 100)
    on_card = memory_needed(layers, kept, largest_size=30, largest_evaluated=30, device=torch.device("cuda"))
    assert on_card == needed - 4 * 55
    evaluating = memory_needed(layers, kept, largest_size=1, largest_evaluated=300, device=CPU)
    assert evaluating == 4 * (100 + 55) + 4 * 4 * 55 + 4 * 100 * 30


def test_the_whole_step_is_left_alone_where_memory_will_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watched(looked_at: nn.Module, batch: PackedBatch) -> LossSums:
        sizes.append(len(batch.codes))
        return masked_lm_loss(looked_at, batch)

    enough = look(model(), loss=watched)
    assert max(sizes) > 1
    sizes.clear()
    monkeypatch.setattr(preflight, "memory_available", lambda *arguments: 1000)
    short = look(model(), loss=watched)
    assert sizes == [1]
    assert short["memory_needed"] == pytest.approx(enough["memory_needed"], rel=0.2)
    assert short["without_gradient"] == ()
    assert short["epoch_seconds_predicted"] > 0
    assert short["out_of_memory"] is None  # nothing ran out: needed and available say it


def test_a_step_over_which_memory_runs_out_is_a_fact_and_another_error_is_not_hidden() -> None:
    facts = look(model(), loss=Fails(2, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    assert facts["out_of_memory"] is True
    assert facts["without_gradient"] == ()
    with pytest.raises(RuntimeError, match="shapes"):
        look(model(), loss=Fails(2, RuntimeError("shapes do not fit")))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))


def test_free_memory_is_what_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       24684092 kB\nMemFree:  9 kB\nMemAvailable:   22707768 kB\n")
    assert free_memory(tmp_path / "meminfo") == 22707768 * 1024
    assert free_memory(tmp_path / "missing") is None


GROUPS = {
    1: ("5:memory:/job\n4:cpu:/other", "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("0::/job/step", "job", "memory.max", "memory.current", ""),
}


@pytest.mark.parametrize("version", [1, 2])
def test_the_room_of_control_groups_is_the_least_of_all_above(tmp_path: Path, version: int) -> None:
    membership, folder, limit, usage, prefix = GROUPS[version]
    (tmp_path / "membership").write_text(membership)
    room = tmp_path / "membership", tmp_path / "mounted"
    assert control_group_room(*room) is None

    def group(path: str, allowed: str, used: int, inactive: int) -> None:
        (tmp_path / "mounted" / path).mkdir(parents=True, exist_ok=True)
        stat = f"x 1\n{prefix}inactive_file {inactive}"
        for name, text in ((limit, allowed), (usage, str(used)), ("memory.stat", stat)):
            (tmp_path / "mounted" / path / name).write_text(text)

    group(folder, "1000", 700, 150)
    assert control_group_room(*room) == 450
    group(str(Path(folder).parent), "max" if version == 2 else str(2**63 - 4096), 0, 0)
    assert control_group_room(*room) == 450
    group(str(Path(folder).parent), "800", 700, 0)
    assert control_group_room(*room) == 100


def test_memory_that_the_model_holds_counts_as_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 5000)
    monkeypatch.setattr(memory, "control_group_room", lambda: None)
    assert memory_available(nn.Linear(9, 10), CPU) == 5000 + 400
    monkeypatch.setattr(memory, "control_group_room", lambda: 3000)
    assert memory_available(nn.Linear(9, 10), CPU) == 3000 + 400


# Time


def test_an_epoch_takes_its_steps_and_its_evaluation() -> None:
    seen = StepPass(
        loss=1.0, reached=frozenset(), zero=frozenset(), not_finite=frozenset(), size=100, seconds=6.0,
        forward_seconds=2.0, kept=Kept(100, 1, 1),
    )  # fmt: skip
    load = Load(steps=10, step_size=50, largest_size=100, draw_seconds=0.5, evaluation_size=400, largest_evaluated=200)
    assert epoch_seconds(seen, load, optimizer=0.25) == pytest.approx(10 * (0.5 + 3.0 + 0.25) + 8.0)


def test_the_load_of_an_epoch_is_what_its_steps_hold() -> None:
    steps, evaluated = batches(accumulation_steps=2), next(iter(batches().epoch(1)))
    load = Load.of(steps, (*evaluated, *evaluated))
    drawn = [[batch.num_tokens for batch in step] for step in steps.epoch(1)]
    assert load.steps * load.step_size == pytest.approx(sum(map(sum, drawn)))
    assert load.largest_size == max(map(max, drawn))
    assert load.evaluation_size == 2 * load.largest_evaluated == 2 * evaluated[0].num_tokens


def test_slow_steps_are_predicted_to_take_long() -> None:
    import time

    def slow(looked_at: nn.Module, batch: PackedBatch) -> LossSums:
        time.sleep(0.002 * len(batch.codes))
        return masked_lm_loss(looked_at, batch)

    steps = batches()
    rows = sum(len(batch.codes) for step in steps.epoch(1) for batch in step)
    evaluated = sum(len(batch.codes) for batch in next(iter(steps.epoch(1)))) * 2
    assert look(model(), steps, loss=slow)["epoch_seconds_predicted"] > 0.95 * 0.002 * (rows + evaluated)


# Masks


class MasksOfPatients(TrainingBatches):
    """A bug: the order is new in every epoch, but a patient's masks are always the same."""

    def epoch(
        self, epoch: int, first_step: int = 0, *, accumulation_steps: int | None = None
    ) -> Iterator[list[PackedBatch]]:
        order = np.random.default_rng(epoch).permutation(self._patients)
        for first in range(0, len(order), self._batch_size):
            patients = order[first : first + self._batch_size]
            sequences, _ = cut(gather(self._split, patients), self._max_position)
            parts = [
                mask_tokens(codes, vocab_size=VOCABULARY, generator=np.random.default_rng(patient))
                for patient, codes in zip(patients, np.split(sequences.codes, sequences.offsets[1:-1]), strict=True)
            ]
            shown, scored = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            yield [MaskedSequences(sequences, shown, scored).batch(0, len(sequences), row_length=64)]


def test_masks_that_stay_with_their_patient_are_found_in_any_order() -> None:
    wrong = MasksOfPatients(
        Patients(200), np.arange(200), batch_size=16, max_position=50, row_length=64,  # type: ignore[arg-type]
        vocab_size=VOCABULARY, seed=0,
    )  # fmt: skip
    first, second = (next(iter(wrong.epoch(epoch)))[0].codes for epoch in (1, 2))
    assert not torch.equal(first, second)  # the order changes, and only the order
    assert masks_change(wrong.epoch(1), wrong.epoch(2)) is False
    assert look(model(), wrong)["training_masks_change"] is False


def test_an_epoch_that_is_repeated_is_found() -> None:
    steps = batches(200)
    assert masks_change(steps.epoch(1), steps.epoch(1)) is False


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 200},
        {"codes": 3},
        {"accumulation_steps": 4},
        {"mlm_probability": 0.5},
    ],
)
def test_masks_that_are_drawn_anew_always_count_as_changing(options: dict[str, Any]) -> None:
    for seed in range(20):
        steps = batches(200, seed=seed, **options)
        assert masks_change(steps.epoch(1), steps.epoch(2)) is True


def test_masks_are_compared_over_what_can_be_selected_alone() -> None:
    batch = next(batches(40).epoch(1))[0]
    codes = torch.where(batch.scored, batch.labels, batch.codes)
    assert sum(map(len, selected_tokens(batch).values())) == int((codes >= FIRST_CODE).sum())


def test_patients_who_look_alike_do_not_hide_masks_that_never_change() -> None:
    patients = Patients(200)
    patients.patients[:40] = patients.patients[40:80]
    steps = MasksOfPatients(
        patients, np.arange(200), batch_size=16, max_position=50, row_length=64,  # type: ignore[arg-type]
        vocab_size=VOCABULARY, seed=0,
    )  # fmt: skip
    assert [masks_change(steps.epoch(1), steps.epoch(epoch)) for epoch in range(2, 12)] == [False] * 10


def test_nothing_is_said_of_masks_where_too_few_tokens_were_met_twice() -> None:
    for steps in (batches(1, codes=1), batches(2)):
        assert masks_change(steps.epoch(1), steps.epoch(2)) is None


def test_no_more_steps_are_drawn_than_it_takes() -> None:
    drawn = 0

    def counted(epoch: int) -> Iterator[list[PackedBatch]]:
        nonlocal drawn
        for step in batches(2000).epoch(epoch):
            drawn += 1
            yield step

    assert masks_change(counted(1), counted(2)) is True
    assert drawn < 60  # of 250


# Two drawings of one set
