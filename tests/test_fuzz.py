"""What do the readers make of input that nobody would think of?

Whatever a file holds, reading it gives a result or a `UserError` of one line that names it, and nothing is left of an
output that failed. `BEHRT_FUZZ_EXAMPLES` sets how many inputs each property is tried on; the draws are the same
everywhere.
"""

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from behrt.adapter_files import load_adapter
from behrt.batches import TrainingBatches
from behrt.checkpoints import CHECKSUMS_FILE, Base, load_checkpoint, save_checkpoint
from behrt.config import BEHRTConfig, ExperimentSettings, UserError, load_experiment
from behrt.doctor.diagnosis import diagnose
from behrt.doctor.facts import completed
from behrt.doctor.targets import read_target
from behrt.files import write_checksums
from behrt.model import BEHRTForMaskedLM
from behrt.parameters import apply_lora_to_behrt, set_trainable
from behrt.prepare import prepare
from behrt.prepare_options import PrepareOptions
from behrt.records import select_records
from behrt.sequences import open_prepared
from behrt.sweep.settings import load_sweep
from behrt.tasks.finetuned import TaskDescription, load_finetuned_checkpoint
from behrt.tasks.heads import BEHRTForTask
from behrt.vocabulary import Vocabulary

from .bad_input import files_below
from .small_records import BIRTH, DEATH, plain_events, write_meds
from .test_mimic import TABLES

EXAMPLES = int(os.environ.get("BEHRT_FUZZ_EXAMPLES", "0"))


def tried(examples: int) -> Callable[[Any], Any]:
    """How a property is tried: always on the same inputs, so that a test fails for everybody or for nobody."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="behrt-fuzz-") as name:
        yield Path(name)


def reads(read: Callable[[], Any], *names: str) -> bool:
    """Whether it is read; if not, one line says so and names one of `names`. Anything else is the reader's mistake."""
    try:
        read()
    except UserError as error:
        text = str(error)
        assert "\n" not in text.strip(), text
        assert not names or any(name in text for name in names), text
        return False
    return True


# --- tables of events ---

TIMES = st.one_of(
    st.none(),
    st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59)).map(
        lambda time: (time - datetime(1970, 1, 1)).days * 86_400_000_000
    ),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63) + 1]),
)
CODES = st.one_of(
    st.sampled_from(["A", "B", "C"]),
    st.none(),
    st.sampled_from([BIRTH, DEATH, "A", "B", "ICD10CM//E119", "", " ", "[MASK]"]),
    st.text(),
)
SUBJECTS = st.one_of(*[st.integers(1, 4)] * 6, st.integers(-(2**63), 2**63 - 1), st.none())
VALUES = st.one_of(st.none(), st.floats(width=32))
COLUMN_TYPES = (
    pl.Int64, pl.UInt64, pl.Int8, pl.Float64, pl.String, pl.Boolean, pl.Binary, pl.Date, pl.Time, pl.Datetime("ns"),
    pl.Datetime("us", "UTC"), pl.Duration("us"), pl.List(pl.Int64), pl.Struct({"a": pl.Int64}), pl.Categorical, pl.Null,
)  # fmt: skip


@st.composite
def event_frames(draw: DrawFn) -> pl.DataFrame:
    """Events, some columns of which may be missing, or of a type that nobody expects."""
    rows = draw(st.lists(st.tuples(SUBJECTS, TIMES, CODES, VALUES), max_size=30))
    frame = pl.DataFrame(
        rows,
        schema={"subject_id": pl.Int64, "time": pl.Int64, "code": pl.String, "numeric_value": pl.Float32},
        orient="row",
    ).with_columns(pl.col("time").cast(pl.Datetime("us")))
    if draw(st.booleans()):
        born = frame.select(pl.col("subject_id").unique()).with_columns(
            time=pl.lit(datetime(1950, 1, 1)), code=pl.lit(BIRTH)
        )
        frame = pl.concat([frame, born], how="diagonal")
    change = draw(st.sampled_from(["none", "none", "none", "drop", "type", "more"]))
    column = draw(st.sampled_from(frame.columns))
    if change == "drop":
        frame = frame.drop(column)
    elif change == "type":
        dtype = draw(st.sampled_from(COLUMN_TYPES))
        with suppress(pl.exceptions.PolarsError, pl.exceptions.PanicException):  # polars' own limits, not the reader's
            frame = frame.with_columns(pl.col(column).cast(dtype, strict=False))
    elif change == "more":
        frame = frame.with_columns(visit_id=pl.lit(draw(st.one_of(st.text(), st.integers(0, 9)))))
    return frame


PREPARE_OPTIONS = st.fixed_dictionaries(
    {"min_patients": st.just(1), "min_tokens": st.integers(1, 3), "split": st.sampled_from(["100/0/0", "80/10/10"])},
    optional={
        "missing_birth": st.sampled_from(["drop", "keep"]),
        "static_codes": st.just("keep"),
        "numeric_bins": st.integers(2, 4),
        "icd_digits": st.integers(1, 7),
        "visit_gap_hours": st.sampled_from([0.001, 24.0, 1e6]),
        "exclude": st.sampled_from([("A",), ("^$",), (".",)]),
    },
)


def prepares(here: Path, options: PrepareOptions) -> bool:
    """Whether `here/in` becomes prepared records that are whole; if not, nothing is left of them."""
    before = files_below(here)
    if reads(lambda: prepare(here / "in", here / "out", options)):
        data = open_prepared(here / "out")
        for split in ("train", "tuning", "held_out"):
            data.split(split).check(len(data.vocabulary))
        return True
    assert files_below(here) == before
    return False


@given(frame=event_frames(), options=PREPARE_OPTIONS)
@tried(100)
def test_any_table_of_events_is_prepared_or_refused_in_one_line(frame: pl.DataFrame, options: dict[str, Any]) -> None:
    with folder() as here:
        (here / "in").mkdir()
        frame.write_parquet(here / "in" / "0.parquet")
        prepares(here, PrepareOptions(**options))


# --- MIMIC-IV tables ---

CELLS = st.one_of(
    st.sampled_from(["1", "2", "100", "200", "2180-05-01 08:00:00", "9999-12-31", "0001-01-01", "", "-1", "1e9", "F"]),
    st.integers().map(str),
    st.text(max_size=8),
    st.binary(max_size=8).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
)  # fmt: skip


@st.composite
def tables(draw: DrawFn) -> dict[str, bytes]:
    """The tables, with cells, rows and headers changed at some places; text as it is, quoting included."""
    name = draw(st.sampled_from([name for name in TABLES if name != "labevents"]))
    lines = [line.split(",") for line in TABLES[name].strip().split("\n")]
    for _ in range(draw(st.integers(1, 6))):
        row = draw(st.integers(0 if draw(st.integers(0, 5)) == 0 else 1, len(lines) - 1))
        kind = draw(st.sampled_from(["cell", "cell", "cell", "row", "long", "short"]))
        if kind == "cell" and lines[row]:
            lines[row][draw(st.integers(0, len(lines[row]) - 1))] = draw(CELLS)
        elif kind == "row":
            lines.append(draw(st.lists(CELLS, min_size=1, max_size=8)))
        elif kind == "long":
            lines[row] = [*lines[row], draw(CELLS)]
        elif kind == "short":
            lines[row] = lines[row][:1]
    text = "\n".join(",".join(cells) for cells in lines).encode("utf-8", "surrogateescape")
    return {**{other: content.encode() for other, content in TABLES.items()}, name: text}


@given(content=tables(), zipped=st.booleans(), options=PREPARE_OPTIONS)
@tried(40)
def test_any_change_of_a_mimic_table_is_prepared_or_refused_in_one_line(
    content: dict[str, bytes], zipped: bool, options: dict[str, Any]
) -> None:
    with folder() as here:
        (here / "in").mkdir()
        for name, text in content.items():
            file = here / "in" / (f"{name}.csv.gz" if zipped else f"{name}.csv")
            file.write_bytes(gzip.compress(text) if zipped else text)
        prepares(here, PrepareOptions(format="mimic4", **options))


# --- damaged files ---

DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "zero", "insert"]), st.floats(0, 1, exclude_max=True), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


def damaged(content: bytes, damage: list[tuple[str, float, int]]) -> bytes:
    """The bytes with some of them changed, at places given as a share of the length."""
    changed = bytearray(content)
    for kind, share, value in damage:
        place = int(share * len(changed))
        if kind == "flip" and changed:
            changed[place] ^= value
        elif kind == "cut":
            del changed[place:]
        elif kind == "zero":
            changed[place : place + value] = bytes(len(changed[place : place + value]))
        else:
            changed[place:place] = bytes([value] * 3)
    return bytes(changed)


@cache
def good() -> Path:
    """A folder of good files: events, tables, prepared records, and a checkpoint of each kind. Removed at the end."""
    root = Path(tempfile.mkdtemp(prefix="behrt-fuzz-good-"))
    write_meds(root / "meds", plain_events(30))
    (root / "mimic").mkdir()
    for name, text in TABLES.items():
        (root / "mimic" / f"{name}.csv.gz").write_bytes(gzip.compress(text.encode()))
    prepare(root / "meds", root / "prepared", PrepareOptions())
    vocabulary = Vocabulary.of_codes(["A", "B", "C"])
    for name in ("full", "lora"):
        model = small_model()
        if name == "lora":
            apply_lora_to_behrt(model, rank=2, alpha=4, generator=torch.Generator().manual_seed(1))
        save_checkpoint(root / name, model, vocabulary=vocabulary, epoch=1, base=Base(seed=0))
    for name in ("tuned_head", "tuned_lora"):
        tuned = BEHRTForTask(small_model().behrt, 1, generator=torch.Generator().manual_seed(2))
        if name == "tuned_lora":
            apply_lora_to_behrt(tuned, rank=2, alpha=4, train_embeddings=False, generator=torch.Generator())
        else:
            set_trainable(tuned, freeze_base=True, train_embeddings=False)
        task = TaskDescription(name="task", kind="binary", names=("outcome",)).as_dict()
        save_checkpoint(root / name, tuned, vocabulary=vocabulary, epoch=1, base=Base(seed=0), task=task)
        load_finetuned_checkpoint(root / name)
    return root


@pytest.fixture(scope="module", autouse=True)
def _good_files_are_removed() -> Iterator[None]:
    yield
    if good.cache_info().currsize:
        shutil.rmtree(good())
        good.cache_clear()


def small_model() -> BEHRTForMaskedLM:
    config = BEHRTConfig(
        vocab_size=8, embedding_dim=8, hidden_dim=8, num_layers=1, num_heads=2, feedforward_dim=8, max_position=50
    )
    return BEHRTForMaskedLM(config, generator=torch.Generator().manual_seed(0))


@contextmanager
def copy_with(kind: str, name: str, damage: list[tuple[str, float, int]]) -> Iterator[Path]:
    """A copy of a good folder in which one file is damaged."""
    with folder() as here:
        shutil.copytree(good() / kind, here / "in")
        file = here / "in" / name
        file.write_bytes(damaged(file.read_bytes(), damage))
        yield here


@given(damage=DAMAGE)
@tried(50)
def test_damaged_parquet_is_prepared_or_refused_in_one_line(damage: list[tuple[str, float, int]]) -> None:
    with copy_with("meds", "data/0.parquet", damage) as here:
        prepares(here, PrepareOptions(missing_birth="drop", min_patients=1))


@given(name=st.sampled_from(["patients", "admissions", "diagnoses_icd"]), damage=DAMAGE)
@tried(30)
def test_damaged_gzip_is_prepared_or_refused_in_one_line(name: str, damage: list[tuple[str, float, int]]) -> None:
    with copy_with("mimic", f"{name}.csv.gz", damage) as here:
        prepares(here, PrepareOptions(format="mimic4", missing_birth="drop", min_patients=1, min_tokens=1))


def first_batch(prepared: Path) -> None:
    """What a training does with prepared records before its first step."""
    chosen = ExperimentSettings.model_validate({"data": {"data": str(prepared)}})
    records = select_records(open_prepared(prepared), chosen)
    steps = TrainingBatches(
        records.training,
        records.training_patients,
        max_position=records.max_position,
        row_length=records.row_length,
        vocab_size=len(records.data.vocabulary),
        batch_size=8,
        seed=0,
    )
    (batch,) = next(iter(steps.epoch(1)))
    assert int(batch.codes.min()) >= 0
    assert int(batch.codes.max()) < len(records.data.vocabulary)
    assert int(batch.visits.min()) >= 0


@given(
    name=st.sampled_from(["train.arrow", "train.arrow", "tuning.arrow", "dataset.json", "vocabulary.json"]),
    damage=DAMAGE,
)
@tried(80)
def test_damaged_prepared_records_can_be_trained_on_or_are_refused_in_one_line(
    name: str, damage: list[tuple[str, float, int]]
) -> None:
    with copy_with("prepared", name, damage) as here:
        reads(lambda: first_batch(here / "in"), "in")


@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))
@tried(400)
def test_sequences_with_other_bits_can_be_trained_on_or_are_refused_in_one_line(
    places: list[tuple[float, int]],
) -> None:
    flips = [
        ("flip", 0.2 + 0.5 * share, bits) for share, bits in places
    ]  # among the tokens, not in what describes them
    with copy_with("prepared", "train.arrow", flips) as here:
        reads(lambda: first_batch(here / "in"), "train.arrow")


@given(
    kind_and_name=st.sampled_from(
        [("full", name) for name in ("model.safetensors", "checkpoint.json", "vocabulary.json")]
        + [("lora", name) for name in ("adapter_model.safetensors", "adapter_config.json", "checkpoint.json")]
    ),
    damage=DAMAGE,
)
@tried(80)
def test_a_damaged_checkpoint_is_loaded_or_refused_in_one_line(
    kind_and_name: tuple[str, str], damage: list[tuple[str, float, int]]
) -> None:
    kind, name = kind_and_name
    with copy_with(kind, name, damage) as here:
        reads(lambda: load_checkpoint(here / "in"))
        if kind == "lora":
            reads(lambda: load_adapter(small_model(), here / "in"))


def reads_finetuned(checkpoint: Path) -> bool:
    """As one that somebody else made, whose checksums are right."""
    write_checksums(checkpoint, CHECKSUMS_FILE, [path for path in checkpoint.iterdir() if path.name != CHECKSUMS_FILE])
    return reads(lambda: load_finetuned_checkpoint(checkpoint))


@given(
    kind_and_name=st.sampled_from(
        [("tuned_head", name) for name in ("trained.safetensors", "checkpoint.json", "vocabulary.json")]
        + [("tuned_lora", name) for name in ("adapter_model.safetensors", "adapter_config.json")]
    ),
    damage=DAMAGE,
)
@tried(40)
def test_a_damaged_checkpoint_of_a_fine_tuned_run_is_loaded_or_refused_in_one_line(
    kind_and_name: tuple[str, str], damage: list[tuple[str, float, int]]
) -> None:
    kind, name = kind_and_name
    with copy_with(kind, name, damage) as here:
        reads_finetuned(here / "in")


# --- settings ---

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(0, 100), st.floats(), st.text(max_size=10), st.dates(),
    st.sampled_from(["auto", "small", "query", "hmm", "1e-3", "val_loss", "tpe", "grid", "float", "int"]),
    st.binary(max_size=5), st.sampled_from([10**30, -(10**30), 1e308, 1e-308]),
)  # fmt: skip
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(task=st.dictionaries(st.sampled_from(["name", "kind", "names", "gap", "edges", "weights", "labels_of"]), NESTED))
@tried(40)
def test_any_description_of_a_task_is_read_or_refused_in_one_line(task: dict[str, Any]) -> None:
    with copy_with("tuned_head", "vocabulary.json", []) as here:
        file = here / "in" / "checkpoint.json"
        about = json.loads(file.read_text())
        file.write_text(json.dumps({**about, "task": {**about["task"], **task}}, default=str))
        reads_finetuned(here / "in")


def sections() -> SearchStrategy[dict[str, Any]]:
    """Experiments that have the keys of one, and anything for their values."""
    per_section = {
        name: st.dictionaries(st.sampled_from(list(fields)), SCALARS, max_size=4) | NESTED
        for name, fields in ExperimentSettings().model_dump(exclude={"note"}).items()
    }
    return st.fixed_dictionaries({}, optional={**per_section, "note": NESTED, "other": NESTED})


RANGE = st.sampled_from([0, 1, 2, 0.0, 0.1, 1.0, -1e308, 1e308, 1e-308, 10**20])
BOUNDS = RANGE | RANGE | RANGE | RANGE | st.floats() | st.integers() | NESTED
PARAMETERS = st.fixed_dictionaries(
    {"type": st.one_of(*[st.sampled_from(["float", "int", "categorical"])] * 4, NESTED), "low": BOUNDS, "high": BOUNDS},
    optional={
        "step": BOUNDS,
        "log": st.booleans() | NESTED,
        "choices": st.lists(SCALARS, max_size=4) | NESTED,
    },
) | st.fixed_dictionaries({"type": st.just("categorical"), "choices": st.lists(SCALARS, max_size=4) | NESTED})
SEARCHED = ("lr", "dropout", "lora_rank", "use_lora", "batch_size", "weight_decay", "model_size", "lora_targets")


def sweeps() -> SearchStrategy[dict[str, Any]]:
    space = st.dictionaries(st.sampled_from(SEARCHED), PARAMETERS, min_size=1, max_size=3)
    return st.fixed_dictionaries(
        {"space": space | NESTED},
        optional={
            "settings": st.dictionaries(st.sampled_from(["epochs", "use_lora", "lr", "model_size"]), SCALARS) | NESTED,
            "sampler": st.sampled_from(["tpe", "grid", "cmaes"]) | NESTED,
            "pruner": st.sampled_from(["median", "none"]) | NESTED,
            "budget": st.fixed_dictionaries({}, optional={"trials": SCALARS, "hours": SCALARS}) | NESTED,
            "seed": SCALARS,
            "base": SCALARS,
        },
    )


LINES = st.text(alphabet=st.sampled_from(list("abc:-[]{}&*!|>%@`\"'#?, \n\t0123.\ufeff\0~")), max_size=60)


@given(content=sections().map(lambda value: yaml.safe_dump(value, allow_unicode=True)) | LINES | st.text(max_size=60))
@tried(150)
@example(content="model: {dropout: 2024-13-45}")
def test_any_experiment_file_is_read_or_refused_in_one_line(content: str) -> None:
    with folder() as here:
        file = here / "e.yaml"
        file.write_bytes(content.encode("utf-8", "replace"))
        reads(lambda: load_experiment(file).model.config(vocab_size=100), "e.yaml", "num_heads")


@given(content=sweeps().map(lambda value: yaml.safe_dump(value, allow_unicode=True)) | LINES)
@tried(500)
def test_any_sweep_file_is_read_or_refused_in_one_line(content: str) -> None:
    with folder() as here:
        file = here / "s.yaml"
        file.write_bytes(content.encode("utf-8", "replace"))
        reads(lambda: load_sweep(file), "s.yaml")


# --- what the doctor reads ---

NUMBERS = st.one_of(
    st.floats(), st.integers(), st.integers(0, 10), st.none(), st.text(max_size=5), st.booleans(), st.just(1e300)
)  # fmt: skip
NAMES = st.sampled_from(
    ["epoch", "step", "train_loss", "val_loss", "loss", "val_accuracy", "acc", "lr", "grad_norm", "x"]
)


@st.composite
def logs(draw: DrawFn) -> tuple[str, str]:
    """A name and the text of a file: a table, JSON, or lines as tools print them."""
    kind = draw(st.sampled_from(["csv", "json", "jsonl", "log"]))
    if kind == "csv":
        names = draw(st.lists(NAMES, min_size=1, max_size=4))
        rows = draw(st.lists(st.lists(NUMBERS, min_size=len(names), max_size=len(names)), max_size=6))
        separator = draw(st.sampled_from([",", ";", "\t"]))
        return "t.csv", "\n".join(separator.join(map(str, row)) for row in [names, *rows])
    if kind == "json":
        points = st.fixed_dictionaries({}, optional={"epoch": NUMBERS, "value": NUMBERS})
        figures = st.dictionaries(NAMES, st.lists(NUMBERS | points, max_size=5) | NUMBERS, max_size=4)
        return "t.json", json.dumps(draw(figures | NESTED.filter(_is_json)))
    if kind == "jsonl":
        return "t.jsonl", "\n".join(
            json.dumps(row) for row in draw(st.lists(st.dictionaries(NAMES, NUMBERS), min_size=1, max_size=5))
        )
    words = ["Epoch 1/3", "Epoch ", "| Train Loss: ", "Val Loss: ", "Acc: ", "12%", "nan", "1e999", "Total: ", "9" * 40,
             "Patience: 3/10", "Trainable: ", "LoRA applied to: ", "\n", "vocabulary ", "{", "[", "loss="]  # fmt: skip
    pieces = draw(st.lists(st.sampled_from(words) | NUMBERS.map(str), max_size=30))
    return "t.log", "".join(pieces)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


@given(file=logs())
@tried(250)
def test_any_record_of_a_run_is_judged_or_refused_in_one_line(file: tuple[str, str]) -> None:
    name, text = file
    with folder() as here:
        path = here / name
        path.write_bytes(text.encode("utf-8", "replace"))
        judged: list[dict[str, Any]] = []
        if reads(lambda: judged.append(diagnose(completed(read_target(str(path)))).as_dict()), name):
            json.dumps(judged[0], allow_nan=False)


FACTS = (
    "total_parameters", "trainable_parameters", "vocab_size", "lr", "val_patients", "chance_loss", "training", "total",
)  # fmt: skip
PARTS = ("facts", "settings", "parameters", "patients", "status", "vocab_size")


@given(
    run=st.dictionaries(st.sampled_from(PARTS), st.dictionaries(st.sampled_from(FACTS), NUMBERS) | NUMBERS),
    figures=st.dictionaries(NAMES, st.lists(NUMBERS, max_size=4)),
)
@tried(80)
def test_any_folder_of_a_run_is_judged_or_refused_in_one_line(run: dict[str, Any], figures: dict[str, Any]) -> None:
    with folder() as here:
        (here / "logs").mkdir()
        (here / "run.json").write_text(json.dumps(run))
        (here / "logs" / "metrics_history.json").write_text(json.dumps(figures))
        reads(lambda: diagnose(completed(read_target(str(here)))), "run.json", "metrics_history.json")


def test_the_fuzzed_inputs_are_both_read_and_refused() -> None:
    """Strategies that only ever break, or never do, would prove nothing."""
    outcomes: dict[str, set[bool]] = {"records": set(), "experiment": set(), "log": set()}

    @given(frame=event_frames(), content=sections(), file=logs())
    @tried(60)
    def collect(frame: pl.DataFrame, content: dict[str, Any], file: tuple[str, str]) -> None:
        with folder() as here:
            (here / "in").mkdir()
            frame.write_parquet(here / "in" / "0.parquet")
            outcomes["records"].add(prepares(here, PrepareOptions(min_patients=1, missing_birth="keep", min_tokens=1)))
            (here / "e.yaml").write_text(yaml.safe_dump(content), encoding="utf-8", errors="replace")
            outcomes["experiment"].add(reads(lambda: load_experiment(here / "e.yaml")))
            (here / file[0]).write_bytes(file[1].encode("utf-8", "replace"))
            outcomes["log"].add(reads(lambda: read_target(str(here / file[0]))))

    collect()
    assert all(found == {True, False} for found in outcomes.values()), outcomes
