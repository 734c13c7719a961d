"""How fast does `behrt` train, beside what a user would pick instead?

`throughput` times `behrt`, Hugging Face with PEFT, and the guide's recipe in turns of one process; `memory` trains each
in a process of its own; `equal` checks that the work is the same; `quality` measures the seconds until 90% of what can
be learned is learned; `flat` trains on more and more patients; `report` writes the measured part of
`docs/performance.md` and its figures. Results are kept in `results.json` beside this file, and every measurement is a
run in MLflow (experiment `throughput`). `make bench` does all but `quality`, `make bench-quality` that one.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any

import click

from behrt.config import PRESETS, ExperimentSettings, load_experiment
from behrt.files import write_json

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from footprint import environment, memory_mib, train_on  # noqa: E402 - in this folder

ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"

SIMULATED, SYNPUF = "simulated", "synpuf-meds"
CONTENDERS = ("behrt", "hf", "guide")
SIZES = ("small", "large")
ADAPTATIONS: dict[str, dict[str, Any]] = {"lora": {"use_lora": True, "lora_rank": 16}, "full": {}}
QUICK = PRESETS["quick"]
FLAT_PATIENTS = {1_000: 58, 5_000: 12, 58_000: 1}
"""Epochs of each, so that all train as many steps: the heap of a process grows over its first thousand."""
EMPTY: dict[str, Any] = {
    "machine": {}, "throughput": [], "memory": [], "equal": None, "quality": None, "flat": []
}  # fmt: skip


def load_results() -> dict[str, Any]:
    return EMPTY | (json.loads(RESULTS.read_text()) if RESULTS.exists() else {})


def all_results() -> dict[str, Any]:
    """With those of `startup.py` and `prepare.py`."""
    others = {"startup": HERE / "startup.json", "preparation": HERE / "prepare.json"}
    return load_results() | {name: json.loads(path.read_text()) for name, path in others.items() if path.exists()}


def save_results(**found: Any) -> None:
    write_json(RESULTS, {**load_results(), **found})


def add_row(table: str, row: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Puts a row in the place of an earlier one of the same keys."""
    others = [other for other in load_results()[table] if any(other[key] != row[key] for key in keys)]
    save_results(**{table: [*others, row]})


def machine() -> dict[str, Any]:
    """What the figures depend on; nothing that names this one machine."""
    from importlib.metadata import version

    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    found = {
        "cpu": next(names, platform.processor() or platform.machine()),
        "amx": torch.cpu._is_amx_tile_supported(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def track(
    name: str, params: Mapping[str, Any], figures: Mapping[str, float], per_round: Mapping[str, list[float]]
) -> None:
    """A measurement as a run of the MLflow experiment `throughput`."""
    from behrt.tracking import TrackedRun

    run = TrackedRun(
        experiment="throughput", name=name, params={**params, **machine()}, tags={}, source="experiments/throughput"
    )
    for step, values in enumerate(zip(*per_round.values(), strict=True), start=1):
        run.log_figures(dict(zip(per_round, values, strict=True)), step=step)
    run.log_figures(figures)
    run.finish("FINISHED")


def settings_for(flags: Mapping[str, Any], *, size: str, adaptation: str, **others: Any) -> ExperimentSettings:
    return load_experiment(flags={**flags, "model_size": size, **ADAPTATIONS[adaptation], **others})


def records_for(settings: ExperimentSettings) -> Any:
    from behrt.records import open_records, select_records

    return select_records(open_records(settings.data), settings)


def data_options(function: Callable[..., None]) -> Callable[..., None]:
    """`--data`, `--synpuf` and `--batch-size`. The command gets `sets`: flags of each set of records, by name."""

    @click.option("--data", type=click.Path(path_type=Path, exists=True), help="Prepared records of synpuf-meds.")
    @click.option("--synpuf", type=click.Path(path_type=Path, exists=True), help="synpuf-meds, to be prepared first.")
    @click.option("--batch-size", default=32, show_default=True, help="Patients per step, for all.")
    @wraps(function)
    def with_sets(data: Path | None, synpuf: Path | None, batch_size: int, **options: Any) -> None:
        from behrt.prepare import prepare
        from behrt.prepare_options import PrepareOptions

        data, synpuf = (path.resolve() if path else None for path in (data, synpuf))
        os.chdir(ROOT)
        if data is None and synpuf is not None:
            data = ROOT / "data" / SYNPUF
            if not data.exists():
                prepare(synpuf, data, PrepareOptions())
        sets: dict[str, dict[str, Any]] = {SIMULATED: {"batch_size": batch_size}}
        if data is not None:
            sets[SYNPUF] = {"batch_size": batch_size, "data": str(data)}
        function(sets=sets, **options)

    return with_sets


device_option = click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")


@click.group()
def cli() -> None:
    """Measure speed, beside Hugging Face and the guide's recipe."""


# Tokens per second


@cli.command()
@data_options
@device_option
@click.option("--rounds", default=5, show_default=True, help="Turns of each contender.")
@click.option(
    "--steps", default=20, show_default=True, help="Steps a turn of a small model; a large one takes a tenth."
)
@click.option("--warmup", default=3, show_default=True, help="Steps before the first round, and at least a turn.")
@click.option("--size", "sizes", multiple=True, type=click.Choice(SIZES), default=SIZES, show_default=True)
@click.option("--adaptation", "adaptations", multiple=True, type=click.Choice(list(ADAPTATIONS)), default=ADAPTATIONS)
@click.option("--own-precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True)
@click.option("--max-position", default="auto", show_default=True, help="Longest sequence, as of `behrt train`.")
@click.option("--compile/--no-compile", "compiled", default=False, help="As of `behrt train`.")
def throughput(
    sets: dict[str, dict[str, Any]],
    device: str,
    rounds: int,
    steps: int,
    warmup: int,
    sizes: tuple[str, ...],
    adaptations: tuple[str, ...],
    own_precision: str,
    max_position: str,
    compiled: bool,
) -> None:
    """Real tokens per second of every contender, in turns."""
    for (data, flags), size, adaptation in product(sets.items(), sizes, adaptations):
        others = {"device": device, "precision": own_precision, "max_position": max_position, "compile": compiled}
        settings = settings_for(flags, size=size, adaptation=adaptation, **others)
        turns = max(1, steps // 10) if size == "large" else steps
        compared = compare(settings, rounds, turns, max(warmup, turns))
        row = {"data": data, "size": size, "adaptation": adaptation, **compared}
        add_row("throughput", row, ("data", "size", "adaptation", "device", "max_position"))
        save_results(machine=machine())
        for name, found in row["contenders"].items():
            rates = [tokens / seconds for tokens, seconds in zip(row["tokens"], found["seconds"], strict=True)]
            rounds_of = zip(found["flops"], found["seconds"], row["rates"]["bf16"], strict=True)
            shares = [flops / seconds / rate for flops, seconds, rate in rounds_of]
            params = {
                key: row[key] for key in ("data", "size", "adaptation", "batch_size", "vocab_size", "max_position")
            }
            track(
                f"{data} {size} {adaptation} {name}",
                {**params, "contender": name, "precision": found["precision"], "steps": turns},
                {"median_tokens_per_second": statistics.median(rates)},
                {"tokens_per_second": rates, "waiting_seconds": found["waiting"], "share_of_bf16_rate": shares},
            )
            click.echo(f"{data} {size} {adaptation} {name}: {statistics.median(rates):,.0f} tokens/s", err=True)


def compare(settings: ExperimentSettings, rounds: int, steps: int, warmup: int) -> dict[str, Any]:
    """Turns of `steps` steps of each contender, round after round; all of them on the same tokens."""
    import torch
    from contenders import NAMES, PRECISIONS, make_contender, matrix_rate, work_of

    from behrt.devices import choose_device

    records, device = records_for(settings), choose_device(settings.training.device)
    contenders = {name: make_contender(name, settings, records, device) for name in NAMES}
    for contender in contenders.values():
        contender.turn(warmup)  # the first epoch
    works = [work_of(settings, records, epoch, steps) for epoch in range(2, rounds + 2)]
    found: dict[str, dict[str, Any]] = {
        name: {"precision": contender.precision, "seconds": [], "waiting": [], "flops": []}
        for name, contender in contenders.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for work in works:
        for name, dtype in PRECISIONS.items():
            rates[name].append(matrix_rate(dtype, device))
        for name, contender in contenders.items():
            turn = contender.turn(steps)
            if (turn.tokens, turn.scored) != (work.tokens, work.scored):
                raise click.ClickException(
                    f"{name} trained on {turn.tokens} tokens, {turn.scored} of them scored; expected {work.tokens} and "
                    f"{work.scored}: the work is not the same"
                )
            found[name]["seconds"].append(turn.seconds)
            found[name]["waiting"].append(turn.waiting)
            found[name]["flops"].append(contender.flops(work))
    return {
        "batch_size": settings.training.batch_size,
        "vocab_size": len(records.data.vocabulary),
        "max_position": records.max_position,
        "steps": steps,
        "tokens": [work.tokens for work in works],
        "scored": [work.scored for work in works],
        "rates": rates,
        "contenders": found,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


# Memory


@cli.command()
@data_options
@device_option
@click.option("--steps", default=5, show_default=True, help="That each contender trains.")
def memory(sets: dict[str, dict[str, Any]], device: str, steps: int) -> None:
    """Peak memory of every contender, each in a process of its own, on synpuf-meds where that is given."""
    from contenders import NAMES

    data, flags = list(sets.items())[-1]
    for size, adaptation, name in product(SIZES, ADAPTATIONS, NAMES):
        words = [name, json.dumps(flags), size, adaptation, device, str(steps)]
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "one", *words]
        done = subprocess.run(command, capture_output=True, env=environment(), text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"{name}: {done.stderr}")
        row = {"data": data, "size": size, "adaptation": adaptation, "contender": name, **json.loads(done.stdout)}
        add_row("memory", row, ("data", "size", "adaptation", "contender"))
        named = {key: row[key] for key in ("data", "size", "adaptation", "contender")}
        track(f"memory {' '.join(named.values())}", named, {"peak_mib": row["peak_mib"]}, {})
        click.echo(f"{size} {adaptation} {name}: {row['peak_mib']:,.0f} MiB", err=True)


@cli.command(hidden=True)
@click.argument("words", nargs=6)
def one(words: tuple[str, ...]) -> None:
    """A few steps of one contender; prints what memory they took at most."""
    import torch
    from contenders import make_contender

    name, flags, size, adaptation, device, steps = words
    settings = settings_for(json.loads(flags), size=size, adaptation=adaptation, device=device)
    contender = make_contender(name, settings, records_for(settings), torch.device(device))
    before = memory_mib("VmRSS", os.getpid())
    contender.turn(int(steps))
    if device == "cuda":
        peak, before = torch.cuda.max_memory_allocated() / 2**20, 0.0
    else:
        peak = memory_mib("VmHWM", os.getpid())
    click.echo(json.dumps({"peak_mib": round(peak, 1), "of_training_mib": round(peak - before, 1)}))


# The same work


@cli.command()
@click.option("--steps", default=20, show_default=True)
def equal(steps: int) -> None:
    """Losses of `behrt` and the guide's recipe from the same weights; exit code 1 where they differ."""
    import equal as check

    os.chdir(ROOT)
    settings = settings_for({}, size="small", adaptation="full", dropout=0.0, precision="fp32", device="cpu")
    found = check.equal_work(settings, records_for(settings), steps=steps)
    save_results(equal=found)
    track("equal work", {"steps": steps}, {"largest_difference": found["largest_difference"]}, {})
    click.echo(f"largest relative difference of {steps} losses: {found['largest_difference']:.1e}", err=True)
    if not check.is_equal(found):
        raise click.ClickException("the work is not the same")


# Seconds to quality


@cli.command()
@device_option
@click.option(
    "--cap", default=420.0, show_default=True, help="Seconds of training after which a contender is given up."
)
@click.option("--share", default=0.9, show_default=True, help="Of the gap, to be closed.")
@click.option(
    "--adaptation",
    type=click.Choice(list(ADAPTATIONS)),
    default="lora",
    show_default=True,
    help="Of `behrt`, as the next four.",
)
@click.option("--lr", default=QUICK["lr"], show_default=True)
@click.option("--table-rate", default=QUICK["table_rate"], show_default=True)
@click.option("--mlm-probability", default=QUICK["mlm_probability"], show_default=True)
@click.option("--epochs", default=QUICK["epochs"], show_default=True)
@click.option("--contender", "names", multiple=True, type=click.Choice(CONTENDERS), default=CONTENDERS)
@click.option("--keep/--no-keep", default=True, help="Whether the result replaces that of before.")
def quality(
    device: str,
    cap: float,
    share: float,
    adaptation: str,
    lr: float,
    table_rate: float,
    mlm_probability: float,
    epochs: int,
    names: tuple[str, ...],
    keep: bool,
) -> None:
    """Seconds until most of the gap between unigram and floor is closed, on 5,000 simulated patients."""
    import torch
    from quality import time_to_quality

    os.chdir(ROOT)
    # nobody stops early: the share and the seconds say when it is over
    flags = {
        "lr": lr,
        "table_rate": table_rate,
        "mlm_probability": mlm_probability,
        "epochs": epochs,
        "early_stopping_patience": 0,
    }
    settings = settings_for(flags, size="small", adaptation=adaptation, device=device)
    found = time_to_quality(settings, records_for(settings), torch.device(device), share=share, cap=cap, names=names)
    if not keep:
        click.echo(json.dumps(found["runs"]))
        return
    save_results(quality=found)
    for run in found["runs"]:
        about = {key: value for key, value in run.items() if key not in ("curve", "seconds")}
        reached = {} if run["seconds"] is None else {"seconds_to_quality": run["seconds"]}
        seconds, closed = (list(values) for values in zip(*run["curve"], strict=True))
        name = f"quality {run['contender']} {run['adaptation']} {run['lr']:g}"
        track(name, {**about, "share": share, "cap": cap}, reached, {"seconds": seconds, "closed_gap": closed})


# More patients


@cli.command()
@click.option("--rounds", default=2, show_default=True, help="Trainings of each number of patients, in turns.")
@click.option("--patients", multiple=True, type=int, default=tuple(FLAT_PATIENTS), show_default=True)
def flat(rounds: int, patients: tuple[int, ...]) -> None:
    """Cost per token and peak memory of `behrt train` on more and more simulated patients."""
    from behrt.config import DataSettings
    from behrt.records import open_records

    os.chdir(ROOT)
    folders = {}
    for number in patients:
        prepared = open_records(DataSettings(num_patients=number))
        folders[number] = prepared.folder.resolve()
    found: dict[int, list[dict[str, float]]] = {number: [] for number in patients}
    for _, number in product(range(rounds), patients):
        found[number].append(train_on(folders[number], epochs=FLAT_PATIENTS.get(number, 1)))
        click.echo(f"{number:,} patients: {found[number][-1]}", err=True)
        rows = [{"patients": number, "trainings": trainings} for number, trainings in found.items() if trainings]
        save_results(flat=rows)
    for row in rows:
        per_round = {key: [training[key] for training in row["trainings"]] for key in row["trainings"][0]}
        track(f"flat {row['patients']}", {"patients": row["patients"]}, {}, per_round)


# The page


@cli.command()
def report() -> None:
    """Write the measured part of docs/performance.md and the figures."""
    import page

    page.write(all_results(), ROOT / "docs")


if __name__ == "__main__":
    cli()
