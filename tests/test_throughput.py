"""Is what `make bench` compares comparable: the same work, peers that train what they say, operations counted right?"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from behrt.config import BEHRTConfig, ExperimentSettings, load_experiment
from behrt.pretrain import build_model, masked_lm_loss
from behrt.records import Records, open_records, select_records

ROOT = Path(__file__).parents[1]
HERE = ROOT / "experiments" / "throughput"

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 asks for it

TINY = {"embedding_dim": 8, "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "feedforward_dim": 24, "batch_size": 8}


@pytest.fixture(scope="module")
def harness() -> Iterator[dict[str, ModuleType]]:
    """The modules of `experiments/throughput`, by the names under which they import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield {
            name: importlib.import_module(name) for name in ("contenders", "equal", "flops", "page", "peers", "quality")
        }


@pytest.fixture(scope="module")
def measure(harness: dict[str, ModuleType]) -> ModuleType:
    from .test_docs import load_measure

    return load_measure("throughput")


def settings_of(prepared: Path, **flags: Any) -> ExperimentSettings:
    return load_experiment(flags={"data": str(prepared), "device": "cpu", "precision": "fp32", **TINY, **flags})


def records_of(settings: ExperimentSettings) -> Records:
    return select_records(open_records(settings.data), settings)


def test_from_the_same_weights_behrt_and_the_recipe_have_the_same_losses(
    harness: dict[str, ModuleType], prepared: Path
) -> None:
    """The learning rate is high and sequences are cut, so that windows, masks and every gradient have a say."""
    settings = settings_of(prepared, dropout=0.0, lr=1e-2, max_position=24)
    found = harness["equal"].equal_work(settings, records_of(settings), steps=8)
    assert harness["equal"].is_equal(found), found
    assert found["largest_difference"] < 1e-5
    assert found["behrt"]["losses"][-1] < found["behrt"]["losses"][0] - 0.05
    other = {**found, "same_scored": False}, {**found, "largest_difference": 2e-4}
    assert not any(map(harness["equal"].is_equal, other))


def test_all_contenders_train_on_the_same_tokens_or_are_refused(
    measure: ModuleType, harness: dict[str, ModuleType], prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness["contenders"], "matrix_rate", lambda dtype, device: 1e12)  # takes its time
    settings = settings_of(prepared, use_lora=True, lora_rank=2, max_position=24)
    row = measure.compare(settings, rounds=2, steps=3, warmup=1)
    assert set(row["contenders"]) == {"behrt", "hf-bf16", "hf-fp32", "guide"}
    for found in row["contenders"].values():
        assert all(0 < waiting < seconds for waiting, seconds in zip(found["waiting"], found["seconds"], strict=True))
    generator = np.random.default_rng(0)
    monkeypatch.setattr(harness["peers"], "stream", lambda *place: generator)  # other patients, windows and masks
    with pytest.raises(click.ClickException, match="the work is not the same"):
        measure.compare(settings, rounds=1, steps=2, warmup=1)


@pytest.mark.parametrize("kind", ["hugging_face", "guide"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_peer_trains_what_it_says_and_nothing_else(harness: dict[str, ModuleType], kind: str, lora: bool) -> None:
    peers = harness["peers"]
    model = getattr(peers, kind)(shape(), lora=lora)
    loss = peers.hugging_face_loss if kind == "hugging_face" else peers.guide_loss
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    for _ in range(2):  # in the first step no A of an adapter has a gradient: B is zero
        optimizer.zero_grad()
        loss(model, batch_of(peers)).backward()
        optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    silent = {name for name in trained if "out_proj.lora" in name}  # the guide's adapters
    assert moved == trained - silent
    if not lora:
        assert trained == set(before)
        return
    adapters = {name for name in trained if "lora_" in name}
    rest = {name.removeprefix("base_model.model.") for name in trained - adapters}
    if kind == "guide":
        assert len(silent) == 2 * 2
        assert {name.partition(".")[0] for name in rest} == set(dict(model.named_children())) - {"encoder", "dropout"}
    else:
        assert len(adapters) == 2 * 4 * 2
        assert {name.partition(".modules_to_save")[0] for name in rest} == {"bert.embeddings", "cls"}


def shape() -> BEHRTConfig:
    return BEHRTConfig(
        vocab_size=40, embedding_dim=8, hidden_dim=16, num_layers=2, num_heads=2, feedforward_dim=24, max_position=12
    )


def batch_of(peers: ModuleType) -> Any:
    """Three patients of twelve tokens, all scored."""
    codes = torch.randint(5, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    return peers.PaddedBatch(
        codes=codes,
        ages=torch.full((3, 12), 50.0),
        visits=torch.arange(12).expand(3, 12),
        tokens=torch.ones(3, 12, dtype=torch.bool),
        labels=codes,
    )


@pytest.mark.parametrize(
    ("kind", "lora_rank", "adapted"),
    [("hugging_face", None, 0), ("hugging_face", 16, 4), ("guide", None, 0), ("guide", 16, 0)],
)
def test_operations_on_paper_are_those_that_torch_counts(
    harness: dict[str, ModuleType], kind: str, lora_rank: int | None, adapted: int
) -> None:
    """Without padding, and with every token scored, the peers compute nothing that the formula does not count."""
    peers, flops = harness["peers"], harness["flops"]
    model = getattr(peers, kind)(shape(), lora=lora_rank is not None)
    loss = peers.hugging_face_loss if kind == "hugging_face" else peers.guide_loss
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # a fused kernel computes the scores again in its backward
        loss(model, batch_of(peers)).backward()
    work = flops.Work(tokens=36, scored=36, squared_lengths=3 * 12**2)
    on_paper = flops.training_flops(shape(), work, lora_rank=lora_rank, adapted=adapted, projected=kind == "guide")
    assert counter.get_total_flops() == on_paper


def test_padding_is_no_token_and_rows_are_as_long_as_asked(harness: dict[str, ModuleType], prepared: Path) -> None:
    settings = settings_of(prepared, max_position=24)
    records = records_of(settings)
    contenders = harness["contenders"]
    full, longest = (contenders.padded_batches(settings, records, full_length=whole) for whole in (True, False))
    ((own,), (wide,), (narrow,)) = (
        next(source.epoch(1)) for source in (contenders.own_batches(settings, records), full, longest)
    )
    assert (wide.num_tokens, wide.num_scored) == (narrow.num_tokens, narrow.num_scored)
    assert (own.num_tokens, own.num_scored) == (wide.num_tokens, wide.num_scored)
    assert wide.codes.shape == (8, 24)
    assert narrow.codes.shape[1] == int(narrow.tokens.sum(dim=1).max())
    assert not wide.codes[~wide.tokens].any()
    assert wide.squared_lengths == sum(int(row.sum()) ** 2 for row in wide.tokens)


def test_a_peer_is_evaluated_on_what_behrt_is_evaluated_on(harness: dict[str, ModuleType], prepared: Path) -> None:
    settings = settings_of(prepared, max_position=24)
    records, peers = records_of(settings), harness["peers"]
    model, _, _ = build_model(settings, records)
    copied = peers.copy_of_behrt(model, model.config).eval()
    packed = records.validation.packed(16, records.row_length)
    with torch.inference_mode():
        own = sum(masked_lm_loss(model.eval(), batch).loss.item() for batch in packed)
        for length in (None, 24):
            padded = peers.pad_all(records.validation, 16, length)
            assert sum(batch.num_scored for batch in padded) == records.validation.scored.sum()
            theirs = sum(peers.guide_sums(copied, batch).loss.item() for batch in padded)
            assert theirs == pytest.approx(own, rel=1e-6)


def test_a_contender_is_followed_until_it_has_closed_its_share_or_used_up_its_seconds(
    harness: dict[str, ModuleType],
) -> None:
    def losing(*losses: float) -> Any:
        return harness["quality"].Course("a", {"epochs": 10}, iter([(10.0, loss) for loss in losses]).__next__)

    soon, late, never = losing(6.0, 4.0), losing(6.0, 5.5, 5.0, 4.1), losing(*[6.5] * 5)
    harness["quality"].follow([soon, late, never], 6.0, 4.0, share=0.9, cap=50.0)
    assert [course.reached(0.9) for course in (soon, late, never)] == [20.0, 40.0, None]
    assert never.curve[-1] == (50.0, -0.25)


def test_a_turn_does_not_find_what_the_one_before_has_assembled_ahead(harness: dict[str, ModuleType]) -> None:
    closed = []

    class Source:
        steps_per_epoch = 10

        def epoch(self, epoch: int, first_step: int = 0, **options: Any) -> Iterator[list[int]]:
            try:
                for step in range(first_step, 10):
                    yield [step]
            finally:
                closed.append(epoch)

    steps = harness["contenders"].FirstSteps(Source())
    steps.steps_per_epoch = 3
    assert list(steps.epoch(7)) == [[0], [1], [2]]
    assert closed == [7]


def test_the_page_says_what_was_measured(measure: ModuleType, harness: dict[str, ModuleType]) -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert harness["page"].measured(measure.all_results()) in text


def test_ratios_are_of_the_same_round_and_the_faster_precision(harness: dict[str, ModuleType]) -> None:
    page = harness["page"]
    row = {
        "tokens": [100, 200],
        "contenders": {
            "behrt": {"seconds": [1.0, 4.0]},
            "hf-bf16": {"seconds": [5.0, 8.0]},
            "hf-fp32": {"seconds": [6.0, 8.0]},
            "guide": {"seconds": [30.0, 40.0]},
        },
    }
    assert page.ratios(row, "hf") == [5.0, 2.0]
    assert page.ratios(row, "guide") == [30.0, 10.0]
    assert page.tokens_per_second(row, "behrt") == [100.0, 50.0]
