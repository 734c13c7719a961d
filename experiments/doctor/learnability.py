"""Is "nothing to learn" said of the right records, for cohorts of 100 to 10,000 patients?

Each cohort is simulated and prepared anew. The verdict of counting what stands together (`behrt/cooccurrence.py`) is
put beside what is known exactly: how far the floor lies below the unigram loss where `[MASK]` is shown. Results are
kept in `learnability.json` beside this file as soon as they are there, and a second call goes on where the first
stopped.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import click

from behrt.batches import cut, gather
from behrt.cohort import simulate
from behrt.config import load_experiment
from behrt.cooccurrence import measure_cooccurrence
from behrt.prepare import prepare
from behrt.prepare_options import PrepareOptions
from behrt.records import open_records, select_records

RESULTS = Path(__file__).resolve().parent / "learnability.json"

STRUCTURES = ("hmm", "none")
SEEDS = {100: 5, 300: 5, 1000: 3, 3000: 1, 10_000: 1}
"""Patients of a cohort, and how many cohorts of that size."""


def load_results() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def measure_cohort(folder: Path, structure: str, patients: int, seed: int) -> dict[str, Any]:
    """One row of the results; losses and gains in nats per token shown as `[MASK]`."""
    simulate(folder / "meds", patients=patients, structure=structure, seed=seed)
    prepare(folder / "meds", folder / "prepared", PrepareOptions())
    settings = load_experiment(flags={"data": str(folder / "prepared")})
    records = select_records(open_records(settings.data), settings)
    training, _ = cut(gather(records.training, records.training_patients), records.max_position)
    vocab_size = len(records.data.vocabulary)
    started = time.process_time()
    found = measure_cooccurrence(training, records.validation, vocab_size)
    seconds = time.process_time() - started
    baselines = records.baselines(vocab_size)
    return {
        "structure": structure,
        "patients": patients,
        "seed": seed,
        "vocab_size": vocab_size,
        "validation_patients": len(records.validation.sequences),
        "verdict": found.verdict,
        "gain": found.gain,
        "low": found.low,
        "high": found.high,
        "evidence_patients": found.patients,
        "evidence_tokens": found.tokens,
        "unigram_masked_loss": baselines.unigram_masked_loss,
        "cooccurrence_masked_loss": baselines.cooccurrence_masked_loss,
        "floor_masked_loss": baselines.floor_masked_loss,
        "floor_gap": baselines.unigram_masked_loss - baselines.floor_masked_loss,
        "seconds": round(seconds, 2),
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as a markdown table, a row a structure and size; ranges are over cohorts."""
    lines = [
        "| codes | patients | cohorts | verdict | gain (nats at `[MASK]`) | lowest limit | highest limit "
        "| floor below unigram | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for structure, patients in product(STRUCTURES, SEEDS):
        rows = [row for row in results if (row["structure"], row["patients"]) == (structure, patients)]
        if not rows:
            continue
        verdicts = [row["verdict"] for row in rows]
        said = ", ".join(
            verdict if verdicts.count(verdict) == len(rows) else f"{verdict} ({verdicts.count(verdict)})"
            for verdict in dict.fromkeys(verdicts)
        )
        gain, gap, seconds = (statistics.mean(row[name] for row in rows) for name in ("gain", "floor_gap", "seconds"))
        low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
        lines.append(
            f"| {'hidden Markov model' if structure == 'hmm' else 'random'} | {patients:,} | {len(rows)} | {said} "
            f"| {gain:.3f} | {low:.3f} | {high:.3f} | {gap:.3f} | {seconds:.2f} |"
        )
    return "\n".join(lines)


@click.command()
def main() -> None:
    """Measure every cohort that is not yet in the results, and print the table."""
    results = load_results()
    done = {(row["structure"], row["patients"], row["seed"]) for row in results}
    for patients, structure in product(SEEDS, STRUCTURES):
        for seed in range(SEEDS[patients]):
            if (structure, patients, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                results.append(measure_cohort(Path(folder), structure, patients, seed))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            click.echo(f"{structure} {patients:,} seed {seed}: {results[-1]['verdict']}", err=True)
    click.echo(table(results))


if __name__ == "__main__":
    main()
