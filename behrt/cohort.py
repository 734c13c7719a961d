"""What does a cohort of simulated patients look like, whose hidden model is known?

`simulate` draws patients from `population.py` and writes them as a MEDS 0.4 data set, with the hidden model beside its
metadata, so that the best possible masked-code prediction can be computed exactly (`floor.py`) without drawing anything
again.

Everything that a model sees beside the codes (number of visits, codes per visit, ages, gaps between visits, order
inside a visit) is drawn without regard to the hidden state, and therefore carries no information about it. Were it
otherwise, a model could beat a floor that is computed from the codes alone, and the floor would not be one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from behrt.config import Structure, UserError, refuse_what_is_no_file, resolved
from behrt.files import replacing_file, replacing_folder, write_json
from behrt.outcomes import LABELS_FOLDER, draw_outcomes, label_tables, outcome_generator, outcome_model, save_labels
from behrt.population import Population, code_book, population

FORMAT_VERSION = 1
COHORT_FILES = ("cohort.json", "cohort.safetensors")
"""The hidden model, in the `metadata` folder; whoever prepares the cohort copies both, and has the floor with them."""

SPLITS = {"train": 0.8, "tuning": 0.1, "held_out": 0.1}
BIRTH = "MEDS_BIRTH"
FEWEST_PATIENTS = 20
"""Below this the tuning and held-out splits have fewer than two patients each."""
MOST_PATIENTS = 10_000_000

VISITS = (3, 9)
"""Fewest and most visits of a patient, drawn uniformly."""
CODES_PER_VISIT = (10, 0.6)
"""A visit has one code and binomially many more (trials, probability): 7 on average, and so 42 codes a patient."""
MEDIAN_GAP_DAYS = 75.0
GAP_SIGMA = 0.8
"""Days between visits are log-normal, and one day at least, so that visits of a patient never overlap."""
FIRST_AGE = (58.0, 14.0, 25.0, 85.0)
"""Age in years at the first visit: normal (mean, deviation), clipped (least, most)."""

DAY = np.int64(86_400_000_000)  # microseconds
MINUTE = np.int64(60_000_000)

ARRAYS = ("prior", "initial", "transition", "emission")


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort(Population):
    """The hidden model of a simulated cohort and how the cohort was drawn.

    Attributes:
        structure: `hmm`, or `none` for codes without any structure
        seed: of the patients; the population is the same for every seed
        patients: number of patients over all splits
    """

    structure: Structure
    seed: int
    patients: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Simulated patients as flat arrays, with the hidden state that the data set does not show.

    Attributes:
        profiles: [patients] profile of each patient
        visits: [patients] number of visits of each patient
        stages: [all visits] stage of each visit, patient by patient
        lengths: [all visits] number of codes of each visit
        codes: [all codes] index into the population's codes, visit by visit
        births: [patients] microseconds since 1970
        starts: [all visits] microseconds since 1970
    """

    profiles: NDArray[np.int64]
    visits: NDArray[np.int64]
    stages: NDArray[np.int64]
    lengths: NDArray[np.int64]
    codes: NDArray[np.int64]
    births: NDArray[np.int64]
    starts: NDArray[np.int64]


def draw_rows(
    cumulative: NDArray[np.float64], rows: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """One outcome for each entry of `rows`, from the distribution in that row.

    Args:
        cumulative: [distributions, outcomes] cumulative probabilities.
        rows: [n] which distribution each draw comes from.
    """
    uniform = generator.random(len(rows))
    drawn = np.empty(len(rows), dtype=np.int64)
    for row in range(len(cumulative)):
        chosen = np.flatnonzero(rows == row)
        drawn[chosen] = np.searchsorted(cumulative[row], uniform[chosen] * cumulative[row, -1], side="right")
    drawn[drawn == cumulative.shape[1]] -= 1  # a draw that rounding puts on the very end
    return drawn


def sample(hidden: Population, patients: int, generator: np.random.Generator) -> Sample:
    """Draws patients from a population.

    Lengths and times come first, so that cohorts of one seed and different structure have the same ones.
    """
    visits = generator.integers(VISITS[0], VISITS[1] + 1, size=patients)
    lengths = 1 + generator.binomial(*CODES_PER_VISIT, size=int(visits.sum()))
    first_visit = np.cumsum(visits) - visits  # [patients] where each patient's visits begin
    patient_of_visit = np.repeat(np.arange(patients), visits)

    mean, deviation, least, most = FIRST_AGE
    ages = np.clip(generator.normal(mean, deviation, size=patients), least, most)
    first_days = np.datetime64("2010-01-01", "D").astype(np.int64) + generator.integers(0, 2500, size=patients)
    births = first_days - np.rint(ages * 365.25).astype(np.int64)
    gaps = np.maximum(1, np.rint(MEDIAN_GAP_DAYS * np.exp(GAP_SIGMA * generator.standard_normal(len(lengths)))))
    gaps[first_visit] = 0
    elapsed = np.cumsum(gaps.astype(np.int64))
    days = first_days[patient_of_visit] + elapsed - np.repeat(elapsed[first_visit], visits)
    starts = days * DAY + generator.integers(7 * 60, 18 * 60, size=len(lengths)) * MINUTE

    stage_count = len(hidden.stages)
    profiles = draw_rows(np.cumsum(hidden.prior)[None], np.zeros(patients, dtype=np.int64), generator)
    initial = np.cumsum(hidden.initial, axis=-1)
    transition = np.cumsum(hidden.transition, axis=-1).reshape(-1, stage_count)
    stages = np.empty(len(lengths), dtype=np.int64)
    current = draw_rows(initial, profiles, generator)
    stages[first_visit] = current
    for visit in range(1, int(visits.max())):
        there = np.flatnonzero(visits > visit)  # patients who have such a visit
        current[there] = draw_rows(transition, profiles[there] * stage_count + current[there], generator)
        stages[first_visit[there] + visit] = current[there]

    states = np.repeat(profiles[patient_of_visit] * stage_count + stages, lengths)
    codes = draw_rows(np.cumsum(hidden.emission, axis=-1).reshape(-1, len(hidden.codes)), states, generator)
    return Sample(
        profiles=profiles,
        visits=visits,
        stages=stages,
        lengths=lengths,
        codes=codes,
        births=births * DAY,
        starts=starts,
    )


def events_table(drawn: Sample, codes: Sequence[str]) -> pa.Table:
    """The MEDS events of a sample, by subject and time: a birth, then the codes of each visit, a minute apart.

    A code that is drawn twice in a visit thus has two times, and is no exact duplicate that a reader might drop.
    Subjects are numbered from 1, visits from 1 over all subjects; a birth belongs to no visit (null).
    """
    per_patient = np.add.reduceat(drawn.lengths, np.cumsum(drawn.visits) - drawn.visits)  # [patients] codes
    visit_of_code = np.repeat(np.arange(len(drawn.lengths)), drawn.lengths)
    place = np.arange(len(drawn.codes)) - np.repeat(np.cumsum(drawn.lengths) - drawn.lengths, drawn.lengths)
    times = drawn.starts[visit_of_code] + place * MINUTE

    rows = per_patient + 1  # [patients] the birth and the codes
    is_birth = np.zeros(int(rows.sum()), dtype=np.bool_)
    is_birth[np.cumsum(rows) - rows] = True

    def interleaved(births: NDArray[np.int64] | int, of_codes: NDArray[np.int64]) -> NDArray[np.int64]:
        column = np.empty(len(is_birth), dtype=np.int64)
        column[is_birth] = births
        column[~is_birth] = of_codes
        return column

    code_column = pa.DictionaryArray.from_arrays(
        pa.array(interleaved(len(codes), drawn.codes), pa.int32()), pa.array([*codes, BIRTH])
    )
    return pa.table(
        {
            "subject_id": pa.array(np.repeat(np.arange(1, len(rows) + 1), rows), pa.int64()),
            "time": pa.array(interleaved(drawn.births, times), pa.timestamp("us")),
            "code": code_column.cast(pa.string()),
            "numeric_value": pa.nulls(len(is_birth), pa.float32()),
            "visit_id": pa.array(interleaved(0, visit_of_code + 1), pa.int64(), mask=is_birth),
        }
    )


def draw_splits(patients: int, generator: np.random.Generator) -> NDArray[np.str_]:
    """[patients] the split of each patient, in random order, with the exact shares of `SPLITS`."""
    sizes = {name: round(share * patients) for name, share in SPLITS.items() if name != "train"}
    names = ["train"] * (patients - sum(sizes.values())) + [name for name, size in sizes.items() for _ in range(size)]
    return np.array(names)[generator.permutation(patients)]


def write_table(table: pa.Table, path: Path) -> None:
    with replacing_file(path) as beside:
        pq.write_table(table, beside, compression="zstd")


def refuse_to_replace(out: Path, overwrite: bool) -> None:
    """`UserError` where writing to `out` would destroy something that is not a simulated cohort, or not asked for."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file, expected a folder to write the cohort to; name another one")
    if not any(out.iterdir()):
        return
    if not (out / "metadata" / COHORT_FILES[0]).is_file():
        raise UserError(f"{out}: the folder holds something else than a simulated cohort; name an empty or a new one")
    if not overwrite:
        raise UserError(f"{out}: a simulated cohort is there already; name another folder, or ask to overwrite it")


def simulate(
    out: Path, *, patients: int, structure: Structure = "hmm", seed: int = 0, overwrite: bool = False
) -> Cohort:
    """Writes a simulated cohort as a MEDS data set and returns its hidden model.

    Files: `data/{train,tuning,held_out}/0.parquet`, `metadata/{dataset.json,codes.parquet,subject_splits.parquet}` and
    the hidden model, `metadata/cohort.json` and `metadata/cohort.safetensors` (float64); what happened after the last
    visits, `labels/{disease,readmission,survival}.parquet` and `labels/outcomes.json` (`outcomes.py`). The same
    arguments give the same bytes.

    Args:
        out: folder; made new, or replaced as a whole.
        patients: over all splits; 80% train, 10% tuning, 10% held out.
        structure: `hmm`; or `none`, the same patients with codes drawn uniformly, from which nothing can be learned.
        seed: of the patients. The population is the same for every seed.
        overwrite: replace a simulated cohort that is already there (and nothing else).

    Raises:
        UserError: too few patients, or a folder that must not be replaced.
    """
    if patients < FEWEST_PATIENTS:
        raise UserError(f"--patients: found {patients}, expected {FEWEST_PATIENTS} or more; ask for more patients")
    if patients > MOST_PATIENTS:
        raise UserError(f"--patients: found {patients}, expected {MOST_PATIENTS:,} or fewer: they are drawn in memory")
    refuse_to_replace(out, overwrite)
    assert structure in get_args(Structure)
    hidden = population(structure)
    generator = np.random.Generator(np.random.PCG64(seed))
    splits = draw_splits(patients, generator)
    drawn = sample(hidden, patients, generator)
    table = events_table(drawn, hidden.codes)
    cohort = Cohort(
        structure=structure,
        seed=seed,
        patients=patients,
        codes=hidden.codes,
        profiles=hidden.profiles,
        stages=hidden.stages,
        prior=hidden.prior,
        initial=hidden.initial,
        transition=hidden.transition,
        emission=hidden.emission,
    )
    split_of_row = splits[table["subject_id"].to_numpy() - 1]
    with replacing_folder(resolved(out)) as beside:
        for name in SPLITS:
            write_table(table.filter(pa.array(split_of_row == name)), beside / "data" / name / "0.parquet")
        write_metadata(beside / "metadata", cohort, splits)
        write_labels(beside / LABELS_FOLDER, cohort, drawn)
    return cohort


def write_labels(folder: Path, cohort: Cohort, drawn: Sample) -> None:
    """The outcomes of all patients after their last visits, drawn from the hidden state that only `drawn` holds."""
    last = np.cumsum(drawn.visits) - 1  # [patients] each patient's last visit
    model = outcome_model(cohort.structure)
    outcomes = draw_outcomes(model, drawn.profiles, drawn.stages[last], outcome_generator(cohort.seed))
    ends = drawn.starts[last] + (drawn.lengths[last] - 1) * MINUTE
    save_labels(label_tables(outcomes, np.arange(1, len(last) + 1), ends), model, folder)


def write_metadata(folder: Path, cohort: Cohort, splits: NDArray[np.str_]) -> None:
    """The `metadata` folder of a MEDS data set, with the hidden model in it."""
    write_json(
        folder / "dataset.json",
        {
            "dataset_name": f"BEHRT simulated cohort (structure {cohort.structure}, seed {cohort.seed})",
            "dataset_version": str(FORMAT_VERSION),
            "etl_name": "behrt simulate",
            "etl_version": str(FORMAT_VERSION),
            "meds_version": "0.4.1",
            "license": "CC0-1.0",
            "other_extension_columns": ["visit_id"],
        },
    )
    descriptions, _ = code_book()
    described = {**descriptions, BIRTH: "birth"}
    write_table(
        pa.table(
            {
                "code": pa.array(list(described), pa.string()),
                "description": pa.array(list(described.values()), pa.string()),
                "parent_codes": pa.nulls(len(described), pa.list_(pa.string())),
            }
        ),
        folder / "codes.parquet",
    )
    subjects = pa.array(np.arange(1, len(splits) + 1), pa.int64())
    write_table(
        pa.table({"subject_id": subjects, "split": pa.array(splits.tolist(), pa.string())}),
        folder / "subject_splits.parquet",
    )
    save_cohort(cohort, folder)


def save_cohort(cohort: Cohort, folder: Path) -> None:
    """Writes `cohort.json` and `cohort.safetensors`, from which `load_cohort` gives back the same numbers."""
    with replacing_file(folder / COHORT_FILES[1]) as beside:
        beside.write_bytes(save({name: np.ascontiguousarray(getattr(cohort, name)) for name in ARRAYS}))
    named = {name: value for name, value in asdict(cohort).items() if name not in ARRAYS}
    write_json(folder / COHORT_FILES[0], {"format_version": FORMAT_VERSION, **named})


def load_cohort(folder: Path) -> Cohort:
    """The hidden model in a folder: `metadata` of a simulated data set, or prepared data that were made of one.

    Raises:
        UserError: a file is missing, damaged, or of another format version.
    """
    path, arrays_path = (folder / name for name in COHORT_FILES)
    for file in (path, arrays_path):
        refuse_what_is_no_file(file)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found.pop("format_version")
    except FileNotFoundError:
        raise UserError(f"{path}: not found, expected the hidden model of a simulated cohort; simulate one") from None
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError):
        raise UserError(f"{path}: damaged, expected the JSON of a simulated cohort; simulate it again") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version!r}, expected {FORMAT_VERSION}; simulate the cohort again")
    try:
        arrays = load_file(arrays_path)
        return Cohort(
            structure=found["structure"],
            seed=found["seed"],
            patients=found["patients"],
            codes=tuple(found["codes"]),
            profiles=tuple(found["profiles"]),
            stages=tuple(found["stages"]),
            prior=arrays["prior"],
            initial=arrays["initial"],
            transition=arrays["transition"],
            emission=arrays["emission"],
        )
    except FileNotFoundError:
        raise UserError(
            f"{arrays_path}: not found, expected it beside {path.name}; simulate the cohort again"
        ) from None
    except (OSError, SafetensorError, KeyError, TypeError, AssertionError):
        raise UserError(f"{arrays_path}: damaged, or of another cohort than {path.name}; simulate it again") from None
