"""Is there an answer for every history, and does the answer hold what it promises?"""

import json
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from behrt.cli import main
from behrt.doctor.curves import Curve, curves_of_history, movement, slope
from behrt.doctor.diagnosis import VERDICTS, diagnose, markdown
from behrt.doctor.facts import RunFacts, completed, with_flags
from behrt.doctor.rule import SEVERITIES, Verdict

NAN = math.nan


def run(**curves: list[float]) -> RunFacts:
    return RunFacts(curves={name: Curve.of(enumerate(values, 1)) for name, values in curves.items()}, finished=True)


def falling(epochs: int, low: float = 4.0) -> list[float]:
    return [low + (6.9 - low) * math.exp(-4 * epoch / epochs) for epoch in range(epochs)]


HISTORIES: dict[str, tuple[dict[str, list[tuple[float, float | None]]], str]] = {
    "one epoch": ({"train_loss": [(1, 6.9)], "val_loss": [(1, 6.9)]}, "inconclusive"),
    "one epoch that is NaN": ({"train_loss": [(1, None)], "val_loss": [(1, None)]}, "diverged"),
    "nothing but NaN": ({"val_loss": [(epoch, None) for epoch in range(9)]}, "diverged"),
    "two epochs": ({"train_loss": [(1, 6.9), (2, 6.8)], "val_loss": [(1, 6.9), (2, 6.8)]}, "inconclusive"),
    "gaps": ({"train_loss": [(1, 6.9), (7, 6.0), (20, 5.0)], "val_loss": [(1, 6.9), (7, 6.1), (20, 5.2)]}, "healthy"),
    "zero-based": ({"val_loss": list(enumerate(falling(30)))}, "healthy"),
    "missing validation": ({"train_loss": list(enumerate(falling(30)))}, "inconclusive"),
    "validation at every fifth epoch": (
        {"train_loss": list(enumerate(falling(30))), "val_loss": list(enumerate(falling(30)))[::5]}, "healthy"
    ),
    "validation alone that turns": (
        {"val_loss": list(enumerate([6.9, 6.0, 5.5, 5.4, 5.6, 5.9, 6.2]))}, "overfitting"
    ),
    "no loss at all": ({"learning_rate": [(1, 1e-3), (2, 1e-3)]}, "inconclusive"),
    "empty": ({}, "inconclusive"),
    "all zero": ({"train_loss": [(e, 0.0) for e in range(9)], "val_loss": [(e, 0.0) for e in range(9)]}, "healthy"),
    "one NaN in the middle": (
        {"train_loss": [(e, None if e == 4 else v) for e, v in enumerate(falling(20))]}, "diverged"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HISTORIES)
def test_every_history_gets_an_answer(name: str) -> None:
    points, verdict = HISTORIES[name]
    diagnosis = diagnose(RunFacts(curves={key: Curve.of(values) for key, values in points.items()}, finished=True))
    if name != "all zero":  # nonsense may be called anything
        assert diagnosis.verdict == verdict
    json.dumps(diagnosis.as_dict(), allow_nan=False)
    assert markdown(diagnosis).startswith(f"# Diagnosis: {diagnosis.verdict}")


def test_ten_thousand_epochs_get_an_answer() -> None:
    diagnosis = diagnose(run(train_loss=falling(10_000), val_loss=[value + 0.05 for value in falling(10_000)]))
    assert diagnosis.verdict == "healthy"


def test_any_numbers_at_any_epochs_get_an_answer_that_json_can_hold() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        names = rng.choice(
            ["train_loss", "val_loss", "train_accuracy", "val_accuracy", "gradient_norm", "epoch_seconds"],
            size=rng.integers(0, 7),
        )
        curves = {}
        for name in names:
            count = int(rng.integers(0, 12))
            values = rng.choice([0.0, 1.0, 6.9, -3.0, 1e300, 1e-300, NAN, math.inf], size=count)
            curves[str(name)] = Curve.of(zip(rng.normal(size=count) * 10, values, strict=True))
        known = {key: value for key, value in {"vocab_size": 1000, "epochs": 3}.items() if rng.random() < 0.5}
        diagnosis = diagnose(RunFacts(curves=curves, finished=bool(rng.random() < 0.5), **known))
        json.dumps(diagnosis.as_dict())
        assert diagnosis.verdict in VERDICTS


def test_a_verdict_is_one_of_seven_and_causes_come_before_consequences() -> None:
    assert set(VERDICTS) == set(get_args(Verdict))
    facts = run(train_loss=falling(20, low=1.0), val_loss=[6.9 + 0.05 * epoch for epoch in range(20)])
    assert diagnose(facts).verdict == "overfitting"
    unlearnable = RunFacts(curves=facts.curves, cooccurrence_gain_low=-0.001, cooccurrence_gain_high=0.001)
    diagnosis = diagnose(unlearnable)
    assert diagnosis.verdict == "unlearnable"
    assert {"nothing_to_learn", "overfitting"} <= {finding.rule for finding in diagnosis.findings}
    assert diagnosis.severity == "error"


def test_what_gives_the_verdict_comes_first_then_the_worst() -> None:
    facts = run(train_loss=falling(20, low=1.0), val_loss=[6.9 + 0.05 * epoch for epoch in range(20)])
    findings = diagnose(RunFacts(curves=facts.curves, shared_subjects=3, stopped_early=True)).findings
    assert findings[0].verdict == "overfitting"
    rest = [SEVERITIES.index(finding.severity) for finding in findings if finding.verdict != "overfitting"]
    assert rest == sorted(rest, reverse=True)
    assert findings[-1].rule == "patience_spent"


def test_a_run_in_its_grace_is_warned_and_past_it_lost() -> None:
    flat = [6.91, 6.90] * 15
    for epochs, planned, expected in ((9, 20, "warning"), (10, 20, "error"), (29, 100, "warning"), (30, 100, "error")):
        curve = Curve.of(enumerate(flat[:epochs], 1))
        diagnosis = diagnose(RunFacts(curves={"val_loss": curve}, epochs=planned, vocab_size=1000, finished=False))
        assert (diagnosis.verdict, diagnosis.severity) == ("stuck_at_chance", expected)


def test_a_young_run_that_is_no_better_than_counting_is_called_neither_healthy_nor_underfitting() -> None:
    curve = Curve.of(enumerate([6.85, 6.6, 6.35, 6.2, 6.08], 1))
    known: dict[str, Any] = {"curves": {"val_loss": curve}, "vocab_size": 1000, "copying_loss": 5.4, "floor_loss": 3.4}
    assert diagnose(RunFacts(**known, finished=False)).verdict == "inconclusive"
    assert diagnose(RunFacts(**known, finished=True)).verdict == "underfitting"


def test_a_run_at_the_unigram_loss_is_stuck_though_it_is_far_below_chance() -> None:
    val_loss = [6.9, 6.2, *[5.98, 5.97] * 6]
    facts = RunFacts(curves={"val_loss": Curve.of(enumerate(val_loss, 1))}, vocab_size=1000, finished=True)
    assert diagnose(facts).verdict == "healthy"
    known = RunFacts(curves=facts.curves, vocab_size=1000, unigram_loss=5.97, finished=True)
    assert diagnose(known).verdict == "stuck_at_chance"


def test_learning_to_copy_shown_codes_is_no_learning() -> None:
    val_loss = [6.91, 6.8, 6.6, 6.45, 6.41, 6.40, 6.40, 6.40, 6.40, 6.40]  # on random codes; unigram 6.907
    curve = Curve.of(enumerate(val_loss, 1))
    known: dict[str, Any] = {"curves": {"val_loss": curve}, "vocab_size": 1000, "finished": True, "unigram_loss": 6.907}
    assert diagnose(RunFacts(**known, copying_loss=6.40)).verdict == "stuck_at_chance"
    assert diagnose(RunFacts(**known, copying_loss=6.60)).verdict == "healthy"


def test_where_the_floor_is_known_a_quarter_of_the_gap_separates_little_from_enough() -> None:
    for low, expected in ((5.4, "underfitting"), (5.2, "healthy")):
        curve = Curve.of(enumerate(falling(20, low), 1))
        facts = RunFacts(curves={"val_loss": curve}, vocab_size=1000, copying_loss=6.0, floor_loss=3.5, finished=True)
        assert diagnose(facts).verdict == expected


def test_a_spike_that_recovers_is_a_warning_and_leaves_the_verdict() -> None:
    losses = falling(30)
    losses[12] *= 2
    diagnosis = diagnose(run(train_loss=losses, val_loss=losses))
    assert diagnosis.verdict == "healthy"
    assert "loss_spikes" in {finding.rule for finding in diagnosis.findings}
    assert diagnosis.severity == "warning"


def test_a_low_accuracy_of_few_scored_tokens_is_no_overfitting() -> None:
    facts = run(train_accuracy=[0.10], val_accuracy=[0.01])
    assert diagnose(facts).verdict == "overfitting"
    assert diagnose(RunFacts(curves=facts.curves, val_scored=100)).verdict == "inconclusive"  # 1 of 100: up to 5.4%
    assert diagnose(RunFacts(curves=facts.curves, val_scored=2000)).verdict == "overfitting"


def test_a_slow_fall_near_chance_is_no_beginning_where_embeddings_and_head_stay_random() -> None:
    curve = Curve.of(enumerate(np.linspace(6.97, 6.84, 20), 1))
    known: dict[str, Any] = {"curves": {"val_loss": curve, "train_loss": curve}, "vocab_size": 1000, "finished": True}
    assert diagnose(RunFacts(**known)).verdict == "underfitting"
    assert diagnose(RunFacts(**known, train_embeddings=False, train_head=False)).verdict == "stuck_at_chance"


def test_a_jump_at_the_last_epoch_alone_is_no_turn_yet() -> None:
    train = [6.9, 6.4, 5.9, 5.5, 5.2, 5.0, 4.8]
    val = [6.9, 6.5, 6.0, 5.6, 5.3, 5.6]
    assert diagnose(run(train_loss=train[:6], val_loss=val)).verdict == "healthy"
    assert diagnose(run(train_loss=train, val_loss=[*val, 5.8])).verdict == "overfitting"


def test_a_loss_above_chance_that_falls_is_not_diverging() -> None:
    for losses in ([9.5, 8.9], [9.5, 9.1, 8.7, 8.3, 8.0, 7.65]):
        curve = Curve.of(enumerate(losses, 1))
        assert diagnose(RunFacts(curves={"train_loss": curve}, vocab_size=1000)).verdict != "diverged"
    exploded = Curve.of(enumerate([9.5, 37.0, 55.0, 43.0, 61.0], 1))
    assert diagnose(RunFacts(curves={"train_loss": exploded}, vocab_size=1000)).verdict == "diverged"


def test_a_tenth_above_the_start_separates_divergence_from_a_bad_patch() -> None:
    for last, expected in ((7.6, False), (7.8, True)):
        assert (diagnose(run(train_loss=[7.0, last, last + 0.01])).verdict == "diverged") is expected


def test_a_loss_that_no_vocabulary_explains_has_diverged_from_the_start() -> None:
    assert diagnose(run(train_loss=[28.7, 23.0, 33.8, 27.0, 30.7, 48.5, 24.0])).verdict == "diverged"
    assert (
        diagnose(run(train_loss=[900.0, 400.0, 200.0, 100.0, 50.0, 30.0])).verdict != "diverged"
    )  # perplexity, falling


def test_a_run_in_progress_may_come_back_from_a_jump_for_five_epochs() -> None:
    losses = [7.0, 6.5, 6.0, 5.7, 5.5, 5.4, 5.35, 5.3, 6.9, 6.8, 6.7, 6.7]
    for epochs, finished, expected in ((12, False, False), (12, True, True), (13, False, True)):
        curve = Curve.of(enumerate([*losses, 6.7][:epochs], 1))
        diagnosis = diagnose(RunFacts(curves={"train_loss": curve}, vocab_size=1000, finished=finished))
        assert (diagnosis.verdict == "diverged") is expected


def test_a_rate_that_fails_stays_the_first_thing_named() -> None:
    curve = Curve.of(enumerate([5.72, 5.71, 5.70, 5.70, 5.69, 5.694], 1))
    known: dict[str, Any] = {"curves": {"train_loss": curve, "val_loss": curve}, "vocab_size": 500, "finished": True}
    diagnosis = diagnose(RunFacts(**known, unigram_loss=5.68, copying_loss=5.2, floor_loss=2.9, lr=0.05))
    assert "learning_rate_too_high" in {finding.rule for finding in diagnosis.findings}
    assert diagnosis.findings[0].rule == "underfitting" or diagnosis.verdict == "stuck_at_chance"
    remedies = {finding.rule: finding.remedies for finding in diagnosis.findings}
    assert remedies["learning_rate_too_high"][0] == "--lr 0.05 → 0.005"
    fine = {"train_loss": Curve.of(enumerate(falling(20), 1)), "val_loss": Curve.of(enumerate(falling(20), 1))}
    assert diagnose(RunFacts(curves=fine, lr=0.1, finished=True)).severity == "info"


def test_an_absurd_rate_is_answered_with_one_that_works() -> None:
    for rate, expected in ((5.0, "--lr 5 → 0.001"), (0.05, "--lr 0.05 → 0.005"), (1e-4, "--lr 1e-4 → 1e-5")):
        curves = {"train_loss": Curve.of([(1, 7.0), (2, None)])}
        assert diagnose(RunFacts(curves=curves, lr=rate)).findings[0].remedies[0] == expected


def test_a_record_that_is_too_short_says_so() -> None:
    for curves in ({"val_loss": [6.9, 6.5, 6.0]}, {"train_loss": falling(20)}):
        diagnosis = diagnose(run(**curves))
        assert diagnosis.verdict == "inconclusive"
        assert "too_little_to_judge" in {finding.rule for finding in diagnosis.findings}


def test_a_spike_is_no_jitter_that_speaks_for_divergence() -> None:
    losses = [7.0, 6.5, 6.0, 5.5, 5.2, 5.0, 5.0, 12.0, 5.3, 5.4]
    assert diagnose(run(train_loss=losses, val_loss=losses)).verdict != "diverged"
    thrown_about = [7.0, 6.5, 6.0, 12.0, 5.2, 11.0, 5.0, 12.0, 5.3, 9.4]
    assert diagnose(run(train_loss=thrown_about, val_loss=thrown_about)).verdict == "diverged"


def test_a_pretrained_run_is_read_from_where_it_starts_and_not_from_chance() -> None:
    curves = run(train_loss=[3.0, 2.8, 2.6, 2.4, 2.2, 2.0], val_loss=[3.0, 2.95, 2.9, 2.98, 3.05, 3.1]).curves
    known: dict[str, Any] = {"curves": curves, "vocab_size": 1000, "finished": True}
    assert diagnose(RunFacts(**known, pretrained=True)).verdict == "overfitting"
    assert "overfitting" not in {finding.rule for finding in diagnose(RunFacts(**known, pretrained=False)).findings}


def test_a_run_that_is_over_has_no_grace() -> None:
    curve = Curve.of(enumerate([6.91, 6.90] * 3, 1))
    for finished, expected in ((True, "error"), (False, "warning")):
        assert diagnose(RunFacts(curves={"val_loss": curve}, vocab_size=1000, finished=finished)).severity == expected


def test_divergence_names_a_run_before_all_else() -> None:
    curves = {"train_loss": Curve.of([(1, 7.0), (2, None)])}
    facts = RunFacts(curves=curves, cooccurrence_gain_low=-0.001, cooccurrence_gain_high=0.001)
    assert diagnose(facts).verdict == "diverged"


def test_negative_losses_are_no_cross_entropies_and_no_rule_speaks_of_them() -> None:
    diagnosis = diagnose(run(train_loss=[-1.0, -1.02, -1.03, -1.04, -1.05], val_loss=[-2.0] * 5))
    assert (diagnosis.verdict, diagnosis.findings) == ("inconclusive", ())
    assert "overfitting" in {skipped.rule for skipped in diagnosis.not_checked}


def test_a_learned_model_that_hardly_moves_any_more_is_not_stuck_at_chance() -> None:
    late = Curve.of(enumerate(np.linspace(3.00, 2.975, 10), 1))
    known: dict[str, Any] = {"curves": {"train_loss": late, "val_loss": late}, "finished": True}
    assert diagnose(RunFacts(**known, vocab_size=1000, unigram_loss=5.5)).verdict != "stuck_at_chance"
    assert diagnose(RunFacts(**known)).verdict != "stuck_at_chance"  # no vocabulary of codes is that small
    from_the_middle = Curve.of(enumerate(np.linspace(6.00, 5.97, 10), 50))
    assert diagnose(RunFacts(curves={"train_loss": from_the_middle}, finished=True)).verdict != "stuck_at_chance"


def test_records_on_which_a_model_has_beaten_counting_hold_something() -> None:
    doubt: dict[str, Any] = {"cooccurrence_gain_low": -0.001, "cooccurrence_gain_high": 0.01, "unigram_loss": 6.8}
    learned = {"val_loss": Curve.of(enumerate(falling(20, low=3.1), 1))}
    assert diagnose(RunFacts(**doubt)).verdict == "unlearnable"
    assert diagnose(RunFacts(curves=learned, **doubt, finished=True)).verdict == "healthy"


def test_the_first_gradient_must_be_finite() -> None:
    diagnosis = diagnose(RunFacts(gradient_not_finite=("head.decoder.weight",), first_loss=6.9))
    assert (diagnosis.verdict, diagnosis.severity) == ("unlearnable", "error")


def test_facts_follow_from_facts() -> None:
    facts = completed(RunFacts(vocab_size=1000, total_parameters=200, trainable_parameters=20, lora_parameters=2))
    assert facts.chance_loss == pytest.approx(math.log(1000))
    assert (facts.trainable_percent, facts.use_lora) == (10.0, True)
    assert completed(RunFacts(chance_loss=1.0, vocab_size=1000)).chance_loss == 1.0


def test_flags_go_over_the_record() -> None:
    facts = with_flags(RunFacts(dropout=0.1, lr=1e-3), {"dropout": 0.2, "init_from": "somewhere", "val_patients": 7})
    assert (facts.dropout, facts.lr, facts.pretrained, facts.val_patients) == (0.2, 1e-3, True, 7)


def test_the_device_can_be_told() -> None:
    slow = RunFacts(curves={"epoch_seconds": Curve.of([(1, 900.0)])})
    assert "slow_epochs" in {finding.rule for finding in diagnose(slow).findings}
    assert diagnose(with_flags(slow, {"device": "cpu"})).findings == ()


def test_levels_are_read_off_the_curve_by_hand() -> None:
    curve = Curve.of(enumerate([8.0, 6.0, 4.0, 5.0, 6.0, 6.0, 6.0, 6.0], 1))
    moved = movement(curve)
    assert (moved.start, moved.low, moved.low_epoch, moved.end, moved.rise, moved.fall) == (8, 4, 3, 6, 2, 2)
    assert moved.noise == 0
    jumpy = movement(Curve.of(enumerate([8.0, 6.0, 7.0, 4.0], 1)))  # 6 and 7 meet at 6.5
    assert jumpy.noise == pytest.approx(math.sqrt(0.5 / 4))


def test_the_slope_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(1)
    x, y = np.sort(rng.normal(size=40)), rng.normal(size=40)
    (rate, _), covariance = np.polyfit(x, y, 1, cov="unscaled")
    residuals = y - np.polyval(np.polyfit(x, y, 1), x)
    error = math.sqrt(covariance[0, 0] * (residuals @ residuals) / 38)
    assert slope(Curve(x, y)) == pytest.approx((rate, error))


def test_a_history_file_is_diagnosed_in_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    history = {
        name: [{"epoch": e, "value": v} for e, v in enumerate(falling(20), 1)] for name in ("train_loss", "val_loss")
    }
    (tmp_path / "metrics_history.json").write_text(json.dumps(history))
    assert main(["doctor", str(tmp_path / "metrics_history.json"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["verdict", "findings", "not_checked"]
    assert printed == diagnose(RunFacts(curves=curves_of_history(history), finished=True)).as_dict()
    assert main(["doctor", str(tmp_path / "metrics_history.json")]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert "Diagnosis: healthy" in output.err
    assert "not checked" in output.err


def test_mistakes_of_the_doctors_command_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.csv").write_text("epoch,val_loss\n1,6.9\n")
    mistakes = (
        ["doctor"], ["doctor", "--explain", "overfiting"], ["doctor", str(tmp_path / "nothing")],
        ["doctor", str(tmp_path / "a.csv"), "--map", "val_loss"], ["doctor", str(tmp_path / "a.csv"), "--dropout", "7"],
        ["doctor", str(tmp_path / "a.csv"), "--map", "val_loss=nowhere"],
    )  # fmt: skip
    for arguments in mistakes:
        assert main(arguments) == 2, arguments
        assert len(capsys.readouterr().err.splitlines()) == 1, arguments
    assert main(["doctor", "--explain", "overfiting"]) == 2
    assert "did you mean 'overfitting'?" in capsys.readouterr().err


def test_the_rules_can_be_listed_and_explained(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", "--list"]) == 0
    assert "nothing_to_learn" in capsys.readouterr().out
    assert main(["doctor", "--explain", "overfitting"]) == 0
    assert "`--dropout 0.3`" in capsys.readouterr().out
