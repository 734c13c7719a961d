"""What do the measurements say? The measured part of `docs/performance.md`, and its two figures.

The page has other parts; this one stands between two marks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- experiments/throughput/measure.py report: begin -->", "<!-- end -->"
PEERS = {"hf": "Hugging Face", "guide": "the guide's recipe"}
SIZES = ("small", "large")
TRAINED = {"lora": "LoRA", "full": "everything"}
AIMS = {("small", "hf"): 5, ("large", "hf"): 7, ("large", "guide"): 20}
"""Times as many tokens per second as the peer, by size and peer: what was aimed at."""
QUALITY_AIM = 5


def write(results: dict[str, Any], docs: Path) -> None:
    """The page and the figures, in the folder `docs`."""
    path = docs / "performance.md"
    text = path.read_text(encoding="utf-8") if path.exists() else f"# Performance\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(before + measured(results) + after, encoding="utf-8")
    draw_throughput(results["throughput"], docs / "performance_throughput.png")
    if results["quality"]:
        draw_quality(results["quality"], docs / "performance_quality.png")


def measured(results: dict[str, Any]) -> str:
    """The part between the marks, with both."""
    parts = [
        BEGIN,
        "## Beside what a user would pick instead",
        introduction(results["machine"]),
        throughput_table(results["throughput"]),
        "![Real tokens per second](performance_throughput.png)",
        "### Where the time goes",
        share_table(results["throughput"]),
    ]
    if results["memory"]:
        parts += ["### Memory", memory_table(results["memory"])]
    if results["equal"]:
        parts += ["### The work is the same", equal_work(results["equal"])]
    if results["quality"]:
        parts += ["### Time to quality", quality_table(results["quality"])]
        parts += ["![Closed share of the gap by seconds of training](performance_quality.png)"]
    if results["flat"]:
        parts += ["### More patients", flat_table(results["flat"])]
    if results.get("startup"):
        parts += ["## Start-up", startup_table(results["startup"])]
    if results.get("preparation"):
        parts += ["## Preparing records", preparation_table(results["preparation"])]
    return "\n\n".join([*parts, END])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def startup_table(found: dict[str, Any]) -> str:
    names = ("wall_median", "wall_least", "cpu_median", "cpu_least")
    rows = [[row["what"], *(f"{row[name]:.2f}" if name in row else "" for name in names)] for row in found["rows"]]
    head = ("seconds until", "wall, median", "wall, least", "processor, median", "processor, least")
    return f"""`experiments/throughput/startup.py measure --data DIR`, on prepared synpuf-meds. Stages are those of
real trainings, watched from outside until their first step. Measured apart from the above, like what follows.

{table(head, rows)}"""


def preparation_table(found: dict[str, Any]) -> str:
    head = ("events", "patients", "files", "seconds", "processor seconds", "peak memory, GB")
    rows = [
        [
            *(f"{row[name]:,}" for name in ("events", "subjects", "files")),
            *(f"{row['seconds']:.1f}", f"{row['processor_seconds']:.1f}", f"{row['peak_gb']:.2f}"),
        ]
        for row in found["rows"]
    ]
    return f"""`experiments/throughput/prepare.py measure SOURCE --work DIR`: synpuf-meds, its shards repeated with
other subject ids. Memory is that of the shards in flight, and 17 bytes a patient. Parts that are prepared apart with
`--shard` and put together with `--join` have the same bytes; that is compared in the same run.

{table(head, rows)}"""


def introduction(machine: dict[str, Any]) -> str:
    tiles = "with" if machine["amx"] else "without"
    return f"""`make bench` measures this, `make bench-quality` the time to quality; the numbers are in
`experiments/throughput/results.json` and in MLflow (experiment `throughput`). Here: {machine["cpu"]} {tiles} AMX tiles,
{machine["threads"]} thread{"s" * (machine["threads"] != 1)}, torch {machine["torch"]}, \
transformers {machine["transformers"]}, PEFT {machine["peft"]}.
Absolute times depend on the machine, and on what else it does: read the ratios.

- **`behrt`** is timed through its own trainer, in the precision that `--precision auto` chooses.
- **Hugging Face** is `BertForMaskedLM` of the same size with SDPA and its customary dropout of 0.1, batches padded to
  their longest sequence; PEFT's LoRA of rank 16 on query, key, value and output with trained embeddings and head, or
  everything trained. It is timed with and without bf16 autocast, and the faster one counts. Its embeddings know
  neither ages nor visits, which is less work.
- **The guide's recipe** is `nn.TransformerEncoder` over the four embeddings, padded to the full length, in fp32, with
  logits at every position; its LoRA sits around `out_proj`, where it does not act and costs nothing.

All train on the same patients, windows and masks, the same number of patients a step, AdamW, gradients clipped to 1.
Their turns alternate in one process after a warm-up; a ratio is that of two turns of the same round. Tokens are those
of the patients, padding is not counted."""


def spread(values: Sequence[float], digits: int = 1, unit: str = "") -> str:
    """Median and range."""
    low, middle, high = (
        f"{value:,.{digits}f}{unit}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def contender_of(row: dict[str, Any], peer: str) -> dict[str, Any]:
    """A contender of a row; of a peer in several precisions, the one of the lower median time."""
    found = [contender for name, contender in row["contenders"].items() if name.partition("-")[0] == peer]
    return min(found, key=lambda contender: statistics.median(contender["seconds"]))


def tokens_per_second(row: dict[str, Any], peer: str) -> list[float]:
    """Of each round."""
    return [tokens / seconds for tokens, seconds in zip(row["tokens"], contender_of(row, peer)["seconds"], strict=True)]


def ratios(row: dict[str, Any], peer: str) -> list[float]:
    """How many times as many tokens per second as the peer, of each round."""
    own, other = (contender_of(row, name)["seconds"] for name in ("behrt", peer))
    return [theirs / ours for ours, theirs in zip(own, other, strict=True)]


def model_of(row: dict[str, Any]) -> str:
    """The size, and the card where one was used."""
    return str(row["size"]) if row["device"] == "cpu" else f"{row['size']} on {row['device']}"


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (SIZES.index(row["size"]), row["adaptation"], row["data"]))


def throughput_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| model | trained | records | positions | `behrt`, tokens/s | precision | Hugging Face, tokens/s | precision "
        "| times | guide, tokens/s | times |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in in_order(rows):
        rates = {peer: statistics.median(tokens_per_second(row, peer)) for peer in ("behrt", *PEERS)}
        own, peer = (contender_of(row, name)["precision"] for name in ("behrt", "hf"))
        lines.append(
            f"| {model_of(row)} | {TRAINED[row['adaptation']]} | {row['data']} | {row['max_position']} "
            f"| {rates['behrt']:,.0f} | {own} | {rates['hf']:,.0f} | {peer} | **{spread(ratios(row, 'hf'))}** "
            f"| {rates['guide']:,.0f} | **{spread(ratios(row, 'guide'))}** |"
        )
    rounds, batch = len(rows[0]["tokens"]), rows[0]["batch_size"]
    lines.append("")
    lines.append(
        f"{batch} patients a step, {rounds} round{'s' * (rounds != 1)}; medians, of the ratios with their range. Aims: "
        + ", ".join(f"{aim} times for {size} against {PEERS[peer]}" for (size, peer), aim in AIMS.items())
        + f"; {aims_reached(rows)}."
    )
    return "\n".join(lines)


def aims_reached(rows: Sequence[dict[str, Any]]) -> str:
    """Which of the aims the medians reach."""
    cases = [(row, peer, aim) for row in rows for (size, peer), aim in AIMS.items() if row["size"] == size]
    reached = sum(statistics.median(ratios(row, peer)) >= aim for row, peer, aim in cases)
    return f"{reached} of {len(cases)} are reached"


def share_table(rows: Sequence[dict[str, Any]]) -> str:
    """Shares of the matrix rate and of waiting for input."""
    lines = [
        "Model FLOPs (6 a weight and token where it is trained, 4 where it is frozen, attention inside each patient,",
        "the head at scored tokens; `flops.py`) over the machine's own rate in bf16 products of large matrices,",
        "measured in the same rounds; and the share of a step that passes before its forward begins: the input.",
        "",
        "| model | trained | records | rate in bf16, fp32 (TFLOP/s) | share of the bf16 rate: `behrt` | Hugging Face "
        "| guide | input: `behrt` | Hugging Face | guide |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in in_order(rows):
        rates = ", ".join(f"{statistics.median(row['rates'][name]) / 1e12:.2f}" for name in ("bf16", "fp32"))
        reached = [f"{share_of_rate(row, name):.0%}" for name in ("behrt", *PEERS)]
        waited = [f"{input_share(row, name):.1%}" for name in ("behrt", *PEERS)]
        lines.append(
            f"| {model_of(row)} | {TRAINED[row['adaptation']]} | {row['data']} | {rates} "
            f"| {' | '.join(reached)} | {' | '.join(waited)} |"
        )
    return "\n".join(lines)


def share_of_rate(row: dict[str, Any], peer: str) -> float:
    """Median over rounds of model FLOPs per second over the bf16 rate."""
    found = contender_of(row, peer)
    rounds = zip(found["flops"], found["seconds"], row["rates"]["bf16"], strict=True)
    return statistics.median(flops / seconds / rate for flops, seconds, rate in rounds)


def input_share(row: dict[str, Any], peer: str) -> float:
    """Median over rounds of the share of time before a step's forward."""
    found = contender_of(row, peer)
    return statistics.median(
        waiting / seconds for waiting, seconds in zip(found["waiting"], found["seconds"], strict=True)
    )


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = {(row["size"], row["adaptation"], row["contender"]): row for row in rows}
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = [
        f"Peak resident memory (MiB) of a process that trains a few steps on {rows[0]['data']}, libraries included; in",
        "brackets what training added to the model that had been built.",
        "",
        f"| model | trained | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for size, adaptation in dict.fromkeys((row["size"], row["adaptation"]) for row in in_order(rows)):
        found = (cells.get((size, adaptation, name)) for name in names)
        shown = (f"{row['peak_mib']:,.0f} ({row['of_training_mib']:,.0f})" if row else "" for row in found)
        lines.append(f"| {size} | {TRAINED[adaptation]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def equal_work(found: dict[str, Any]) -> str:
    same = found["same_tokens"] and found["same_scored"]
    counts = "are the same" if same else "**are not the same**"
    return (
        "In every turn above, all contenders counted the same tokens and the same scored tokens, or there would be no\n"
        "result. From the same initial weights, in fp32 and without dropout, `behrt` and the guide's recipe train\n"
        f"{found['steps']} steps: tokens and scored tokens {counts} in each, and the losses differ by at most\n"
        f"{found['largest_difference']:.0e} (relative; {found['tolerance']:.0e} is allowed). The last one is "
        f"{found['behrt']['losses'][-1]:.6f} and {found['guide']['losses'][-1]:.6f}."
    )


def quality_table(found: dict[str, Any]) -> str:
    own = next(run for run in found["runs"] if run["contender"] == "behrt")
    lines = [
        f"Seconds of training until {found['share']:.0%} of the gap between unigram ({found['unigram_loss']:.3f}) and",
        f"floor ({found['floor_loss']:.3f}) is closed: 5,000 simulated patients, small, {found['batch_size']} patients "
        f"a step, at most",
        f"{found['cap']:.0f} s each. All are evaluated after every epoch on the same validation set, with 15% of the "
        "codes to guess; that",
        "is not on the clock.",
        "",
        "| | trained | learning rate | codes to guess in training | precision | epochs | seconds | closed "
        "| times as long as `behrt` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        name = {"behrt": f"`behrt`, `--table-rate {run.get('table_rate', 1):g}`", **PEERS}[run["contender"]]
        chosen = "chosen" if run is own else "customary" if run["customary"] else "granted"
        last, closed = run["curve"][-1]
        seconds = f"{run['seconds']:.0f}" if run["seconds"] is not None else f"not in {last:.0f}"
        lines.append(
            f"| {name} ({chosen}) | {TRAINED[run['adaptation']]} | {run['lr']:g} {run['schedule']} "
            f"| {run['mlm_probability']:.0%} | {run['precision']} | {len(run['curve'])} of {run['epochs']} | {seconds} "
            f"| {closed:.1%} | {times_as_long(run, own)} |"
        )
    lines += [
        "",
        "`--table-rate` gives embedding tables, decoder, biases and norms a higher learning rate than the matrices",
        "inside: a step moves only the rows of the codes that it holds. `--mlm-probability` lets training guess more",
        "codes of each patient (Wettig et al., 2023). Customary are BERT's 1e-4, warmed up over 5% of the steps and",
        "decaying to 0 then, and the guide's constant 1e-4. Others are granted, so that nobody has to lose by a bad",
        "one: the higher rates, and the higher share too. `behrt`'s were chosen on this cohort. "
        f"Aim: {QUALITY_AIM} times against Hugging Face.",
    ]
    return "\n".join(lines)


def times_as_long(run: dict[str, Any], own: dict[str, Any]) -> str:
    if own["seconds"] is None:
        return ""
    if run["seconds"] is None:
        return f"more than {run['curve'][-1][0] / own['seconds']:.1f}"
    return f"{run['seconds'] / own['seconds']:.1f}"


def flat_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "`behrt train`, small, on more and more simulated patients, each training in a process of its own; median and",
        "range. Memory is the most that was resident, and the most of it that no mapped file stands behind.",
        "",
        "| patients | records on disk, MiB | µs per token | peak, MiB | without mapped files, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        values = {key: [training[key] for training in row["trainings"]] for key in row["trainings"][0]}
        lines.append(
            f"| {row['patients']:,} | {values['records_mib'][0]:.1f} | {spread(values['microseconds_per_token'])} "
            f"| {spread(values['peak_mib'], 0)} | {spread(values['anonymous_mib'], 0)} |"
        )
    medians: Callable[[str], list[float]] = lambda key: [  # noqa: E731
        statistics.median(training[key] for training in row["trainings"]) for row in rows
    ]
    cost, memory = medians("microseconds_per_token"), medians("anonymous_mib")
    lines += [
        "",
        f"From {rows[0]['patients']:,} to {rows[-1]['patients']:,} patients the cost of a token changes by "
        f"{cost[-1] / cost[0] - 1:+.0%}, memory without mapped files by {memory[-1] / memory[0] - 1:+.0%}.",
    ]
    return "\n".join(lines)


# Figures


def draw_throughput(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import pandas as pd
    import seaborn as sns

    from behrt.plots import saved_figure

    names = {"behrt": "behrt", **PEERS}
    frame = pd.DataFrame(
        {
            "records": row["data"],
            "model": f"{model_of(row)}, {TRAINED[row['adaptation']]}",
            "trained by": names[peer],
            "rate": rate,
        }
        for row in in_order(rows)
        for peer in names
        for rate in tokens_per_second(row, peer)
    )
    records = list(dict.fromkeys(frame["records"]))
    with saved_figure(path, width=5.2 * len(records), height=4.4) as figure:
        grid = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
        for axes, name in zip(grid, records, strict=True):
            sns.pointplot(
                frame[frame["records"] == name],
                x="model",
                y="rate",
                hue="trained by",
                hue_order=list(names.values()),
                estimator="median",
                errorbar=("pi", 100),
                linestyle="none",
                dodge=0.3,
                ax=axes,
            )
            axes.set(title=name, xlabel="", ylabel="real tokens per second")
            axes.tick_params(axis="x", labelsize=8)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.grid(visible=True, which="minor", axis="y", alpha=0.4)
            axes.get_legend().remove()
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)


def draw_quality(found: dict[str, Any], path: Path) -> None:
    import seaborn as sns

    from behrt.plots import saved_figure

    colours = dict(zip(("behrt", *PEERS), sns.color_palette(), strict=False))
    styles = {"behrt": ["-"], "hf": ["-", "--", ":", "-."], "guide": ["-", "--", ":"]}
    with saved_figure(path, width=8.4, height=4.2) as figure:
        axes = figure.add_subplot()
        for run in found["runs"]:
            peer = run["contender"]
            name = {"behrt": "behrt", **PEERS}[peer]
            seconds, closed = zip(*run["curve"], strict=True)
            axes.plot(
                seconds,
                closed,
                color=colours[peer],
                linestyle=styles[peer].pop(0),
                marker="." if len(seconds) < 4 else None,
                label=f"{name}, {TRAINED[run['adaptation']]}, {run['lr']:g}",
            )
        axes.axhline(found["share"], color="0.4", linewidth=1, label=f"{found['share']:.0%} of the gap")
        axes.set(xlabel="seconds of training", ylabel="closed share of the gap", xlim=(0, None), ylim=(-0.3, 1))
        axes.legend(title=None, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
