"""Does the model compute what it says, and for each patient alone?"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from behrt.adapter_files import sha256_of
from behrt.config import BEHRTConfig, UserError
from behrt.model import BEHRT, BEHRTForMaskedLM, age_bins

TINY = BEHRTConfig(
    vocab_size=50, embedding_dim=12, hidden_dim=16, num_layers=2, num_heads=4, feedforward_dim=32, max_position=12
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_histories(rows: int, length: int, seed: int = 1) -> dict[str, torch.Tensor]:
    draws = seeded(seed)
    return {
        "codes": torch.randint(5, TINY.vocab_size, (rows, length), generator=draws),
        "ages": 110 * torch.rand(rows, length, generator=draws, dtype=torch.float32),
        "visits": torch.randint(0, 20, (rows, length), generator=draws, dtype=torch.int32),
    }


def packed_and_alone(lengths: tuple[int, ...], padding: int) -> tuple[dict[str, torch.Tensor], list[slice]]:
    """One row with patients of these lengths end to end and padding behind, and the place of each."""
    batch = random_histories(1, sum(lengths) + padding)
    segments = [number for number, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    places = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    return {**batch, "segments": torch.tensor([segments], dtype=torch.int32)}, places


def torchs_encoder_with_the_weights_of(model: BEHRT) -> nn.TransformerEncoder:
    config = model.config
    layer = nn.TransformerEncoderLayer(
        config.hidden_dim, config.num_heads, config.feedforward_dim, dropout=0.0, activation="gelu",
        batch_first=True, norm_first=True, dtype=torch.float64,
    )  # fmt: skip
    norm = nn.LayerNorm(config.hidden_dim, dtype=torch.float64)
    reference = nn.TransformerEncoder(layer, config.num_layers, norm=norm, enable_nested_tensor=False)
    for theirs, ours in zip(reference.layers, model.encoder.layers, strict=True):
        attention = ours.attention
        theirs.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat(
                    [p.weight for p in (attention.query, attention.key, attention.value)]
                ),
                "self_attn.in_proj_bias": torch.cat(
                    [p.bias for p in (attention.query, attention.key, attention.value)]
                ),
                "self_attn.out_proj.weight": attention.output.weight,
                "self_attn.out_proj.bias": attention.output.bias,
                "linear1.weight": ours.feedforward.up.weight,
                "linear1.bias": ours.feedforward.up.bias,
                "linear2.weight": ours.feedforward.down.weight,
                "linear2.bias": ours.feedforward.down.bias,
                "norm1.weight": ours.attention_norm.weight,
                "norm1.bias": ours.attention_norm.bias,
                "norm2.weight": ours.feedforward_norm.weight,
                "norm2.bias": ours.feedforward_norm.bias,
            }
        )
    reference.norm.load_state_dict(model.encoder.norm.state_dict())
    return reference


def test_the_encoder_equals_torchs_own():
    model = BEHRT(TINY, generator=seeded()).double().eval()
    with torch.no_grad():  # biases and norms are 0 and 1 at first, which would hide a swapped or forgotten one
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(parameter.numel()), dtype=torch.float64)
    batch = random_histories(3, 10)
    attention_mask = torch.arange(10) < torch.tensor([[10], [7], [1]])
    ours = model(**batch, attention_mask=attention_mask)
    positions = torch.arange(10).expand(3, 10)
    embedded = model.embeddings(batch["codes"], batch["ages"], batch["visits"], positions)
    theirs = torchs_encoder_with_the_weights_of(model)(embedded, src_key_padding_mask=~attention_mask)
    assert ours[attention_mask].shape == (18, TINY.hidden_dim)
    torch.testing.assert_close(ours[attention_mask], theirs[attention_mask], rtol=0, atol=1e-10)
    torch.testing.assert_close(model(**batch), torchs_encoder_with_the_weights_of(model)(embedded), rtol=0, atol=1e-10)


def test_an_embedding_is_the_normalised_sum_of_its_four_tables():
    model = BEHRT(TINY, generator=seeded()).double().eval()
    embeddings = model.embeddings
    codes, ages, visits = torch.tensor([[7, 8]]), torch.tensor([[math.nan, 63.2]]), torch.tensor([[3, 9_999]])
    found = embeddings(codes, ages, visits, torch.tensor([[4, 0]]))
    for place, (code, age, visit, position) in enumerate([(7, 0, 3, 4), (8, 13, 511, 0)]):
        summed = (
            embeddings.codes.weight[code]
            + embeddings.ages.weight[age]
            + embeddings.visits.weight[visit]
            + embeddings.positions.weight[position]
        )
        normalised = (summed - summed.mean()) / (summed.var(correction=0) + 1e-5).sqrt()
        expected = embeddings.projection.weight @ normalised
        torch.testing.assert_close(found[0, place], expected, rtol=0, atol=1e-12)


def test_ages_bin_by_five_years_with_one_bin_for_unknown_and_one_for_a_hundred_and_more():
    every_year = torch.arange(0, 130, dtype=torch.float32)
    expected = [1 + min(int(age) // 5, 20) for age in every_year.tolist()]
    assert age_bins(every_year, 22).tolist() == expected
    assert sorted(set(expected)) == list(range(1, 22))
    assert age_bins(torch.tensor([math.nan, -0.5, math.inf]), 22).tolist() == [0, 1, 21]


def test_packed_rows_give_the_same_outputs_as_one_patient_at_a_time():
    model = BEHRT(TINY, generator=seeded()).double().eval()
    batch, places = packed_and_alone((5, 1, 9, 4), padding=6)
    packed = model(**batch)
    for place in places:
        alone = model(batch["codes"][:, place], batch["ages"][:, place], batch["visits"][:, place])
        torch.testing.assert_close(packed[:, place], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("segmented", [True, False], ids=["with segments", "negative control without segments"])
def test_no_patients_output_depends_on_its_row_neighbours(segmented: bool):
    model = BEHRT(TINY, generator=seeded()).eval()
    batch, (first, second, third) = packed_and_alone((4, 5, 3), padding=0)
    if not segmented:
        del batch["segments"]
    other = {**batch, **{name: batch[name].clone() for name in ("codes", "ages", "visits")}}
    other["codes"][:, second] = (other["codes"][:, second] + 7) % TINY.vocab_size
    other["ages"][:, second] += 20
    other["visits"][:, second] += 3
    with torch.no_grad():
        before, after = model(**batch), model(**other)
    assert not torch.equal(before[:, second], after[:, second])
    unchanged = torch.equal(before[:, first], after[:, first]) and torch.equal(before[:, third], after[:, third])
    assert unchanged is segmented


@pytest.mark.parametrize("segmented", [True, False], ids=["with segments", "negative control without segments"])
def test_no_gradient_flows_from_one_patient_to_another(segmented: bool):
    model = BEHRT(TINY, generator=seeded()).train()
    batch, (first, second, _) = packed_and_alone((4, 5, 3), padding=0)
    if not segmented:
        del batch["segments"]
    embedded = []
    model.embeddings.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    output = model(**batch)
    direction = torch.randn(output[:, first].shape, generator=seeded())
    (gradient,) = torch.autograd.grad((output[:, first] * direction).sum(), embedded)
    gradient = gradient.view(*output.shape)
    assert gradient[:, first].abs().min() > 0
    assert bool(gradient[:, second].any()) is not segmented


def test_padding_is_finite_and_its_content_reaches_no_token():
    model = BEHRT(TINY, generator=seeded()).eval()
    batch = random_histories(3, 8)
    attention_mask = torch.arange(8) < torch.tensor([[8], [5], [0]])  # the last row is nothing but padding
    other = {name: torch.where(attention_mask, tensor, tensor + 1) for name, tensor in batch.items()}
    other["codes"] %= TINY.vocab_size
    outputs = model(**batch, attention_mask=attention_mask)
    assert outputs.isfinite().all()
    others = model(**other, attention_mask=attention_mask.long())
    assert torch.equal(outputs[attention_mask], others[attention_mask])
    outputs.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_batch_of_nothing_but_padding_is_zero():
    model = BEHRTForMaskedLM(TINY, generator=seeded()).eval()
    batch, nothing = random_histories(2, 4), torch.zeros(2, 4, dtype=torch.bool)
    assert not model.behrt(**batch, attention_mask=nothing).any()
    assert model(**batch, attention_mask=nothing, scored=nothing).shape == (0, TINY.vocab_size)


def test_padding_may_stand_before_the_tokens():
    model = BEHRT(TINY, generator=seeded()).double().eval()
    batch = random_histories(1, 6)
    padded = {name: F.pad(tensor, (3, 0)) for name, tensor in batch.items()}
    shown = model(**padded, attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]))
    torch.testing.assert_close(shown[:, 3:], model(**batch), rtol=0, atol=1e-12)


def test_an_attention_mask_hides_tokens_within_segments():
    model = BEHRT(TINY, generator=seeded()).eval()
    batch, _ = packed_and_alone((4, 5), padding=0)
    attention_mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 0, 0]])
    hidden = torch.tensor([[0, 0, 0, -1, 1, 1, 1, -1, -1]])
    masked = model(**batch, attention_mask=attention_mask)
    assert torch.equal(masked, model(**{**batch, "segments": hidden}))
    assert not torch.equal(masked, model(**batch))


def test_positions_restart_for_each_patient_unless_they_are_given():
    model = BEHRT(TINY, generator=seeded()).eval()
    batch, _ = packed_and_alone((3, 4), padding=2)
    restarting = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0]])
    assert torch.equal(model(**batch), model(**batch, positions=restarting))
    assert not torch.equal(model(**batch), model(**batch, positions=restarting + 1))


def test_a_sequence_with_more_tokens_than_positions_is_refused():
    model = BEHRT(TINY)
    with pytest.raises(UserError, match=r"--max-position 12: a sequence has 13 tokens"):
        model(**random_histories(1, 13))
    long_row, _ = packed_and_alone((8, 12), padding=20)  # the row is longer than that, no patient is
    assert model(**long_row).shape == (1, 40, TINY.hidden_dim)
    too_long, _ = packed_and_alone((8, 14), padding=0)
    with pytest.raises(UserError, match="14 tokens"):
        model(**too_long)


def test_the_head_is_computed_only_at_scored_tokens():
    model = BEHRTForMaskedLM(TINY, generator=seeded()).eval()
    batch = random_histories(3, 10)
    scored = torch.rand(3, 10, generator=seeded()) < 0.2
    rows = []
    model.head.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[:-1].numel()))
    full, at_scored = model(**batch), model(**batch, scored=scored)
    assert rows == [30, int(scored.sum())]
    assert at_scored.shape == (int(scored.sum()), TINY.vocab_size)
    torch.testing.assert_close(at_scored, full[scored], rtol=0, atol=1e-6)


def test_patients_are_grouped_once_for_all_layers_that_compute_all_tokens():
    model = BEHRT(TINY).eval()
    groups = []
    for layer in model.encoder.layers:
        layer.attention.register_forward_hook(lambda module, inputs, output: groups.append(inputs[1]))
    batch, _ = packed_and_alone((3, 4), padding=2)
    model(**batch)
    assert len(groups) == 2
    assert groups[0] is groups[1]


def test_the_last_layer_is_computed_only_at_scored_tokens():
    model = BEHRTForMaskedLM(TINY, generator=seeded()).train()
    batch, _ = packed_and_alone((5, 1, 9, 4), padding=3)
    scored = torch.zeros(1, 22, dtype=torch.bool)
    scored[0, [1, 8, 17]] = True  # of the second patient none
    rows = []
    for layer in model.behrt.encoder.layers:
        layer.feedforward.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    model(**batch, scored=scored)
    assert rows == [19, 3]


def test_gradients_are_the_same_whether_all_tokens_are_computed_or_the_scored_ones():
    model = BEHRTForMaskedLM(TINY, generator=seeded()).double().eval()
    batch, _ = packed_and_alone((5, 1, 9, 4), padding=3)
    scored = (torch.rand(1, 22, generator=seeded()) < 0.3) & (batch["segments"] >= 0)
    gradients = []
    for logits in (model(**batch)[scored], model(**batch, scored=scored)):
        gradients.append(torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters())))
    for of_all, of_scored in zip(*gradients, strict=True):
        torch.testing.assert_close(of_all, of_scored, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_the_first_loss_is_close_to_a_uniform_guess(size: str):
    config = BEHRTConfig.of_size(size, vocab_size=1000)
    model = BEHRTForMaskedLM(config, generator=seeded()).eval()
    codes = torch.randint(5, 1000, (16, 50), generator=seeded(1))
    with torch.no_grad():
        logits = model(codes, torch.full((16, 50), 60.0), torch.ones(16, 50, dtype=torch.int32))
    loss = F.cross_entropy(logits.flatten(0, 1), codes.roll(1, dims=1).flatten())
    assert abs(loss.item() - math.log(1000)) < 0.15


def test_a_random_encoder_carries_its_input_onward():
    model = BEHRT(BEHRTConfig.large(vocab_size=1000), generator=seeded()).eval()
    codes = torch.tensor([[2, 7, 3], [2, 8, 3]])
    with torch.no_grad():
        hidden = model(codes, torch.full((2, 3), 60.0), torch.ones(2, 3, dtype=torch.int32))
    assert torch.cosine_similarity(hidden[0, 1], hidden[1, 1], dim=0) < 0.9


def test_the_same_seed_gives_the_same_weights_and_touches_no_other_randomness():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = (BEHRTForMaskedLM(TINY, generator=seeded(3)).state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert sha256_of(one) == sha256_of(two) != sha256_of(BEHRTForMaskedLM(TINY, generator=seeded(4)).state_dict())
    ambient = sha256_of(BEHRTForMaskedLM(TINY).state_dict())
    assert ambient != sha256_of(BEHRTForMaskedLM(TINY).state_dict())
    torch.manual_seed(5)
    assert ambient == sha256_of(BEHRTForMaskedLM(TINY).state_dict())


def test_the_weights_of_a_seed_are_these_on_every_machine():
    weights = BEHRTForMaskedLM(TINY, generator=seeded(0)).state_dict()
    # Frozen random bases are rebuilt from their seed: a change here orphans every adapter trained on one.
    assert sha256_of(weights) == "ae12501ce7bdc8465eb5b57b16d47c9752d7c539d9c8e07bdec33a53b0414744"


def test_initial_weights_have_the_scales_that_were_chosen():
    model = BEHRTForMaskedLM(BEHRTConfig.small(vocab_size=1000), generator=seeded())
    for weight, std in [
        (model.behrt.embeddings.codes.weight, 0.02),
        (model.head.decoder.weight, 0.02),
        (model.behrt.encoder.layers[1].feedforward.down.weight, (1 / 3 / 512) ** 0.5),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert weight.mean().item() == pytest.approx(0, abs=std / 30)
    assert not model.behrt.encoder.layers[0].attention.query.bias.any()


def test_dropout_acts_in_training_mode_only():
    model = BEHRT(TINY, generator=seeded())
    batch = random_histories(2, 8)
    assert not torch.equal(model.train()(**batch), model(**batch))
    assert torch.equal(model.eval()(**batch), model(**batch))


def test_bf16_autocast_stays_close_to_float32_and_learns():
    model = BEHRTForMaskedLM(TINY, generator=seeded()).train()
    batch, _ = packed_and_alone((5, 6), padding=3)
    scored = batch["segments"] == 1
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch, scored=scored).float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        expected = model(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**batch).float()
    tokens = batch["segments"] >= 0
    torch.testing.assert_close(found[tokens], expected[tokens], rtol=0, atol=0.02)


def test_no_layer_is_torchs_multihead_attention():
    model = BEHRTForMaskedLM(TINY)
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
