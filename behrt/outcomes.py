"""What happens to a simulated patient after the last visit, given the hidden state of it?

Three outcomes, drawn from the profile and the stage of the last visit and from nothing else, so that the best possible
prediction of each is known (`ceiling.py`):

    disease      a cardiovascular event within a year: mostly a matter of the profile, which any code tells about
    readmission  an admission within 30 days of the last visit's end: mostly a matter of that visit's stage, which a
                 bag of all codes of a history hides
    survival     death, at a constant rate of profile and stage; follow-up ends at random, regardless of the patient

They happen after the record's end, and leave no trace in the events. Each is a MEDS label file, a row a patient, with
the end of the last visit (the time of its last code) as the prediction time:

    disease.parquet, readmission.parquet    boolean_value: it happened
    survival.parquet                        boolean_value: death was seen; float_value: days until then, or until
                                            follow-up ended

The probabilities lie beside them in `outcomes.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from behrt.config import Structure, UserError
from behrt.files import read_json, replacing_file, write_json
from behrt.labels import told_task
from behrt.population import PROFILES, STAGES

FORMAT_VERSION = 1
LABELS_FOLDER = "labels"
MODEL_FILE = "outcomes.json"
OUTCOMES = ("disease", "readmission", "survival")
STREAM = 2
"""Second word of the seed of the outcomes' own stream; events are drawn from the seed alone."""
DAYS_PER_YEAR = 365.25
FOLLOW_UP_YEARS = (0.5, 3.0)
"""Follow-up of a patient ends at a uniformly drawn time between these."""

# What a condition adds to log-odds (disease) or to log-rates (survival); a companion counts by half.
COMPANION_WEIGHT = 0.5
CARDIOVASCULAR = {
    "coronary artery disease": 2.5, "stroke": 2.3, "heart failure": 2.2, "atrial fibrillation": 2.0,
    "chronic kidney disease": 1.4, "type 2 diabetes": 0.9, "hypertension": 0.8, "COPD": 0.7, "obesity": 0.5,
    "dementia": 0.5, "gout": 0.4, "rheumatoid arthritis": 0.3, "Parkinson's disease": 0.3, "liver cirrhosis": 0.1,
    "alcohol use disorder": 0.1, "HIV infection": 0.0, "prostatic hyperplasia": 0.0, "osteoporosis": -0.3,
    "depression": -0.4, "hypothyroidism": -0.5, "epilepsy": -0.5, "breast cancer": -0.5, "asthma": -0.8,
    "inflammatory bowel disease": -0.8,
}  # fmt: skip
FRAILTY = {
    "liver cirrhosis": 2.0, "heart failure": 1.9, "dementia": 1.8, "breast cancer": 1.5, "COPD": 1.4,
    "Parkinson's disease": 1.3, "chronic kidney disease": 1.2, "stroke": 1.2, "alcohol use disorder": 0.8,
    "HIV infection": 0.5, "coronary artery disease": 0.5, "atrial fibrillation": 0.5, "type 2 diabetes": 0.2,
    "epilepsy": 0.2, "hypertension": 0.0, "prostatic hyperplasia": -0.2, "rheumatoid arthritis": -0.2,
    "inflammatory bowel disease": -0.4, "gout": -0.4, "obesity": -0.5, "osteoporosis": -0.5, "depression": -0.8,
    "hypothyroidism": -0.9, "asthma": -1.0,
}  # fmt: skip

# Base, and what each stage adds to it: onset, treatment, monitoring, complication.
DISEASE = (-2.9, (0.0, 0.2, 0.0, 0.9))
READMISSION = (-1.75, (-1.0, 0.0, -1.4, 2.3))
READMISSION_OF_FRAILTY = 0.3
"""Share of a profile's frailty that its log-odds of readmission have."""
DEATH = (-2.8, (-0.6, 0.0, -0.4, 1.4))


@dataclass(frozen=True, kw_only=True, eq=False)
class OutcomeModel:
    """How likely outcomes are, given the profile and the stage of the last visit; tables are [profiles, stages].

    Attributes:
        disease: probability
        readmission: probability
        hazard: deaths per year, constant in time
        follow_up: years, shortest and longest; follow-up ends uniformly between them
    """

    disease: NDArray[np.float64]
    readmission: NDArray[np.float64]
    hazard: NDArray[np.float64]
    follow_up: tuple[float, float] = FOLLOW_UP_YEARS

    def __post_init__(self) -> None:
        assert self.disease.ndim == 2
        assert self.disease.shape == self.readmission.shape == self.hazard.shape
        assert all(((table >= 0) & (table <= 1)).all() for table in (self.disease, self.readmission))
        assert ((self.hazard > 0) & np.isfinite(self.hazard)).all()
        assert 0 < self.follow_up[0] < self.follow_up[1] < np.inf


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcomes:
    """What happened to each of several patients, [patients].

    Attributes:
        disease: within the year
        readmission: within 30 days
        death: seen before follow-up ended
        days: until death or the end of follow-up
    """

    disease: NDArray[np.bool_]
    readmission: NDArray[np.bool_]
    death: NDArray[np.bool_]
    days: NDArray[np.float64]


def outcome_model(structure: Structure) -> OutcomeModel:
    """The outcomes of the population of a structure; of `none`, the same for everyone.

    >>> hmm = outcome_model("hmm")
    >>> hmm.readmission.shape, bool((hmm.readmission[:, 3] > 3 * hmm.readmission[:, 2]).all())
    ((24, 4), True)
    >>> outcome_model("none").disease
    array([[0.2]])
    """
    if structure == "none":
        return OutcomeModel(
            disease=np.full((1, 1), 0.2), readmission=np.full((1, 1), 0.2), hazard=np.full((1, 1), 0.15)
        )

    def of_profiles(by_condition: Mapping[str, float]) -> NDArray[np.float64]:  # [profiles, 1]
        added = [by_condition[leading] + COMPANION_WEIGHT * by_condition[companion] for leading, companion in PROFILES]
        return np.array(added)[:, None]

    def of_stages(base: float, added: tuple[float, ...]) -> NDArray[np.float64]:  # [1, stages]
        assert len(added) == len(STAGES)
        return base + np.array(added)[None]

    def probability(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
        odds = np.exp(log_odds)
        return np.asarray(odds / (1 + odds))

    frailty = of_profiles(FRAILTY)
    return OutcomeModel(
        disease=probability(of_stages(*DISEASE) + of_profiles(CARDIOVASCULAR)),
        readmission=probability(of_stages(*READMISSION) + READMISSION_OF_FRAILTY * frailty),
        hazard=np.exp(of_stages(*DEATH) + frailty),
    )


def outcome_generator(seed: int) -> np.random.Generator:
    """The stream of a cohort's outcomes, which shares no draw with its events."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, STREAM])))


def draw_outcomes(
    model: OutcomeModel, profiles: NDArray[np.int64], stages: NDArray[np.int64], generator: np.random.Generator
) -> Outcomes:
    """What happens to patients of these profiles, [patients], whose last visits have these stages, [patients]."""
    patients = len(profiles)
    disease = generator.random(patients) < model.disease[profiles, stages]
    readmission = generator.random(patients) < model.readmission[profiles, stages]
    death = generator.standard_exponential(patients) / model.hazard[profiles, stages]  # years
    end = generator.uniform(*model.follow_up, size=patients)
    return Outcomes(
        disease=disease, readmission=readmission, death=death < end, days=DAYS_PER_YEAR * np.minimum(death, end)
    )


def label_tables(
    outcomes: Outcomes, subject_ids: NDArray[np.int64], prediction_times: NDArray[np.int64]
) -> dict[str, pa.Table]:
    """The MEDS label table of each outcome; times are microseconds since 1970."""
    about = {
        "subject_id": pa.array(subject_ids, pa.int64()),
        "prediction_time": pa.array(prediction_times, pa.timestamp("us")),
    }
    values = {
        "disease": {"boolean_value": pa.array(outcomes.disease, pa.bool_())},
        "readmission": {"boolean_value": pa.array(outcomes.readmission, pa.bool_())},
        "survival": {
            "boolean_value": pa.array(outcomes.death, pa.bool_()),
            "float_value": pa.array(outcomes.days.astype(np.float32), pa.float32()),
        },
    }
    return {
        name: pa.table({**about, **values[name]}).replace_schema_metadata(told_task(f"simulated {name}"))
        for name in OUTCOMES
    }


def save_labels(tables: Mapping[str, pa.Table], model: OutcomeModel, folder: Path) -> None:
    """Writes a label file an outcome, and the model that they were drawn from."""
    for name, table in tables.items():
        with replacing_file(folder / f"{name}.parquet") as beside:
            pq.write_table(table, beside, compression="zstd")
    write_json(
        folder / MODEL_FILE,
        {
            "format_version": FORMAT_VERSION,
            "disease": model.disease.tolist(),
            "readmission": model.readmission.tolist(),
            "deaths_per_year": model.hazard.tolist(),
            "follow_up_years": list(model.follow_up),
        },
    )


def load_outcome_model(folder: Path) -> OutcomeModel:
    """What `save_labels` wrote, to the bit.

    Raises:
        UserError: the file is missing, damaged, or of another format version.
    """
    path = folder / MODEL_FILE
    found = read_json(path, missing="expected it beside the labels of a simulated cohort")
    if (version := found.get("format_version")) != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version!r}, expected {FORMAT_VERSION}; simulate the cohort again")
    try:
        shortest, longest = map(float, found["follow_up_years"])
        return OutcomeModel(
            disease=np.array(found["disease"], np.float64),
            readmission=np.array(found["readmission"], np.float64),
            hazard=np.array(found["deaths_per_year"], np.float64),
            follow_up=(shortest, longest),
        )
    except (KeyError, TypeError, ValueError, AssertionError):
        raise UserError(f"{path}: damaged, expected the outcomes of a simulated cohort; simulate it again") from None
