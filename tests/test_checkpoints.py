"""Does a checkpoint give back the same model, and does a damaged one say so?"""

import json
from pathlib import Path

import pytest
import torch

from behrt.checkpoints import CHECKSUMS_FILE, Base, Checkpoint, load_checkpoint, save_checkpoint, transplant
from behrt.config import BEHRTConfig, UserError
from behrt.files import write_checksums
from behrt.model import BEHRTForMaskedLM
from behrt.parameters import apply_lora_to_behrt
from behrt.vocabulary import FIRST_CODE, Vocabulary

CODES = [f"C{number}" for number in range(30)]
BASE = Base(seed=7)


def build(codes: list[str] = CODES, seed: int = 7, **shape: int) -> tuple[BEHRTForMaskedLM, Vocabulary]:
    vocabulary = Vocabulary.of_codes(codes)
    config = BEHRTConfig.small(vocab_size=len(vocabulary), **shape)
    return BEHRTForMaskedLM(config, generator=torch.Generator().manual_seed(seed)).eval(), vocabulary


def outputs(model: BEHRTForMaskedLM) -> torch.Tensor:
    codes = torch.tensor([[2, 6, 9, 3, 12, 3]])
    with torch.inference_mode():
        return model(codes, torch.full(codes.shape, 50.0), torch.tensor([[0, 1, 1, 1, 2, 2]]))


def shaken(model: BEHRTForMaskedLM) -> BEHRTForMaskedLM:
    """The model after some training of what is trainable."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


ADAPTATIONS = {
    "lora": {},
    "lora, frozen embeddings and head": {"train_embeddings": False, "train_head": False},
    "lora, base not frozen": {"freeze_base": False, "targets": ("output",)},
}


@pytest.mark.parametrize("name", ["full", *ADAPTATIONS])
def test_a_checkpoint_gives_the_same_outputs_bit_for_bit(tmp_path: Path, name: str) -> None:
    model, vocabulary = build()
    if name != "full":
        apply_lora_to_behrt(model, rank=4, **ADAPTATIONS[name])
    save_checkpoint(tmp_path / "c", shaken(model), vocabulary=vocabulary, epoch=3, base=BASE)
    loaded = load_checkpoint(tmp_path / "c")
    assert torch.equal(outputs(loaded.model), outputs(model))
    assert (loaded.epoch, loaded.base) == (3, BASE)
    assert loaded.vocabulary.tokens == vocabulary.tokens
    assert not loaded.model.training


def test_a_lora_checkpoint_over_another_seed_is_refused(tmp_path: Path) -> None:
    model, vocabulary = build(seed=7)
    apply_lora_to_behrt(model, rank=4)
    save_checkpoint(tmp_path / "c", shaken(model), vocabulary=vocabulary, epoch=1, base=Base(seed=8))
    with pytest.raises(UserError, match="other frozen weights"):
        load_checkpoint(tmp_path / "c")


def sign_again(checkpoint: Path) -> None:
    """Makes checksums of the files as they are now."""
    files = [path for path in checkpoint.iterdir() if path.name != CHECKSUMS_FILE]
    write_checksums(checkpoint, CHECKSUMS_FILE, files)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("checkpoint.json", None, "holds no checkpoint"),
        ("checkpoint.json", b"{", "is damaged"),
        ("checkpoint.json", b'{"format_version": 99}', "format version 99"),
        ("checkpoint.json", b'{"format_version": 1}', "is damaged"),
        ("vocabulary.json", None, "is missing"),
        ("model.safetensors", None, "is missing"),
        ("model.safetensors", b"\x80\x04garbage", "a pickle, or named like one"),
        ("SHA256SUMS", None, "is missing or damaged"),
        ("SHA256SUMS", b"\xff", "is missing or damaged"),
        ("SHA256SUMS", b"no checksums\n", "is damaged"),
        ("SHA256SUMS", b"0  ../../outside\n", "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, file: str, content: bytes | None, expected: str) -> None:
    model, vocabulary = build()
    save_checkpoint(tmp_path / "c", model, vocabulary=vocabulary, epoch=1, base=BASE)
    (tmp_path / "c" / file).unlink()
    if content is not None:
        (tmp_path / "c" / file).write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        load_checkpoint(tmp_path / "c")
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    model, vocabulary = build()
    save_checkpoint(tmp_path / "c", model, vocabulary=vocabulary, epoch=1, base=BASE)
    about = json.loads((tmp_path / "c" / "checkpoint.json").read_text())
    about["model"]["num_layers"] = 3
    (tmp_path / "c" / "checkpoint.json").write_text(json.dumps(about))
    sign_again(tmp_path / "c")
    with pytest.raises(UserError, match="do not fit the model"):
        load_checkpoint(tmp_path / "c")


def test_a_transplant_matches_rows_by_code_whatever_their_order() -> None:
    donor, there = build(seed=1)
    model, here = build([*reversed(CODES[:20]), "NEW//1", "NEW//2"], seed=2)
    random_rows = model.behrt.embeddings.codes.weight[-2:].clone()
    given = transplant(Checkpoint(shaken(donor), there, 1, BASE), model, here, name="donor")
    assert (given.shared_codes, given.new_codes, given.new_positions) == (20, 2, 0)
    for code in CODES[:20]:
        for table in ("behrt.embeddings.codes.weight", "head.decoder.weight", "head.decoder.bias"):
            assert torch.equal(
                model.state_dict()[table][here.id_of(code)], donor.state_dict()[table][there.id_of(code)]
            )
    assert torch.equal(model.behrt.embeddings.codes.weight[-2:], random_rows)
    for name, value in model.state_dict().items():
        if not name.endswith(("codes.weight", "decoder.weight", "decoder.bias")):
            assert torch.equal(value, donor.state_dict()[name])


def test_a_transplant_of_adapters_gives_the_donors_outputs() -> None:
    donor, vocabulary = build(seed=1)
    apply_lora_to_behrt(donor, rank=4)
    expected = outputs(shaken(donor))
    model, _ = build(seed=2)
    transplant(Checkpoint(donor, vocabulary, 1, BASE), model, vocabulary, name="donor")
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-5)


def test_positions_are_matched_by_number_and_new_ones_counted() -> None:
    donor, vocabulary = build(seed=1, max_position=20)
    model, _ = build(seed=2, max_position=32)
    given = transplant(Checkpoint(donor, vocabulary, 1, BASE), model, vocabulary, name="donor")
    assert given.new_positions == 12
    positions = model.behrt.embeddings.positions.weight
    assert torch.equal(positions[:20], donor.behrt.embeddings.positions.weight)


def test_no_shared_code_and_another_shape_are_refused() -> None:
    donor = Checkpoint(*build(seed=1), 1, BASE)
    with pytest.raises(UserError, match="its vocabulary does not fit: none of the 1 codes"):
        transplant(donor, *build(["OTHER"]), name="donor")
    with pytest.raises(UserError, match="num_layers 2 there, 3 here"):
        transplant(donor, *build(num_layers=3), name="donor")
    assert FIRST_CODE == 5
