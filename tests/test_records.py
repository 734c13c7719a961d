"""Does a run see the records it should, and are its baselines those of exactly these?"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from behrt import records as records_module
from behrt.cli import main
from behrt.config import ExperimentSettings, UserError, load_experiment
from behrt.cooccurrence import measure_cooccurrence
from behrt.records import Records, auto_max_position, open_records, select_records


def select(folder: Path, **flags: object) -> Records:
    settings = load_experiment(flags={"data": str(folder), **flags})
    return select_records(open_records(settings.data), settings)


def test_positions_on_auto_are_the_sizes_own_or_what_99_percent_need_but_at_most_512() -> None:
    lengths = np.arange(1, 101, dtype=np.int32)
    assert auto_max_position(lengths, 50) == 99
    assert auto_max_position(lengths, 200) == 200
    assert auto_max_position(lengths * 100, 50) == 512


def test_an_explicit_number_of_positions_is_kept_and_what_it_cuts_is_reported(prepared: Path) -> None:
    records = select(prepared, max_position=30)
    assert records.max_position == 30
    assert np.diff(records.validation.sequences.offsets).max() <= 30
    lengths = records.training.lengths
    assert records.truncated_share == pytest.approx(np.maximum(lengths - 30, 0).sum() / lengths.sum())


def test_the_unigram_loss_is_that_of_the_training_counts_on_the_validation_labels(prepared: Path) -> None:
    records = select(prepared, max_position=512)
    vocab_size = len(records.data.vocabulary)
    counts = np.ones(vocab_size - 5)
    for patient in range(len(records.training)):
        codes = records.training.sequence(patient)[0]
        np.add.at(counts, codes[codes >= 5] - 5, 1)
    shares = np.log(counts / counts.sum())
    expected = -shares[records.validation.labels - 5].mean()
    found = records.baselines(vocab_size)
    assert found.unigram_loss == pytest.approx(expected, rel=1e-9)
    assert found.chance_loss == math.log(vocab_size)


def test_counting_a_few_patients_at_a_time_counts_every_token_once(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = select(prepared).baselines(100)
    monkeypatch.setattr(records_module, "COUNTED_AT_ONCE", 7)
    assert select(prepared).baselines(100) == whole


def test_of_many_training_patients_a_part_is_enough_to_see_what_stands_together(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(training, validation, vocab_size):
        seen.append(np.diff(training.offsets))
        return measure_cooccurrence(training, validation, vocab_size)

    monkeypatch.setattr(records_module, "measure_cooccurrence", watched)
    whole = select(prepared).baselines(100)
    monkeypatch.setattr(records_module, "TRAINING_TOKENS", 1_000)
    part = select(prepared).baselines(100)
    assert seen[0].sum() > 1_000 >= seen[1].sum() > 900
    assert part.unigram_loss == whole.unigram_loss


def test_the_floor_is_computed_on_what_a_short_model_sees(prepared: Path) -> None:
    """The visits that do not fit say something about those that do, so the floor of all of them is another one."""
    long, short = (select(prepared, max_position=positions) for positions in (100, 15))
    assert short.validation.scored.sum() < long.validation.scored.sum()
    floors = [records.baselines(500).floor_loss for records in (long, short)]
    assert None not in floors
    assert floors[0] != floors[1]


def test_real_records_and_recoded_cohorts_have_no_floor(prepared: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    shutil.copytree(prepared, real)
    (real / "cohort.json").unlink()
    assert select(real).baselines(500).floor_loss is None
    recoded = tmp_path / "recoded"
    assert main(["prepare", str(prepared.parent / "meds"), "--out", str(recoded), "--icd-digits", "3"]) == 0
    assert (recoded / "cohort.json").exists()
    assert select(recoded).baselines(500).floor_loss is None


def test_an_empty_split_is_refused_by_name(prepared: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    from behrt.sequences import SEQUENCE_SCHEMA

    shutil.copytree(prepared, tmp_path / "p")
    with pa.ipc.new_file(str(tmp_path / "p" / "tuning.arrow"), SEQUENCE_SCHEMA):
        pass
    info = json.loads((tmp_path / "p" / "dataset.json").read_text())
    info["splits"]["tuning"]["patients"] = 0
    (tmp_path / "p" / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="no patients in the tuning split"):
        select(tmp_path / "p")


def test_the_training_sample_is_as_large_as_the_validation_set(prepared: Path) -> None:
    records = select(prepared)
    assert len(records.train_evaluation.sequences) == len(records.validation.sequences)
    assert ExperimentSettings().data.max_patients is None
