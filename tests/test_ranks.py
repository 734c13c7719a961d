"""Do several processes train what one process trains, and do they end together?"""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from behrt import pretrain as pretrain_module
from behrt.batches import TrainingBatches
from behrt.cli import main
from behrt.config import BEHRTConfig, ExperimentSettings, TrainingSettings, UserError
from behrt.exits import LostRun, RefusedRun
from behrt.feeding import TrackingRecord
from behrt.history import read_history, read_run
from behrt.model import BEHRTForMaskedLM
from behrt.parameters import apply_lora_to_behrt, count_parameters
from behrt.pretrain import LAUNCH, masked_lm_loss, pretrain
from behrt.ranks import RankLost, Ranks
from behrt.resume import attempt_to_resume
from behrt.run_report import Listener
from behrt.sequences import open_prepared
from behrt.stopper import Terminated
from behrt.train_command import has_ended, run_before_restart
from behrt.trainer import Trainer

from .conftest import Workspace
from .empty_stores import lay_store
from .forked_ranks import ForkedRanks, command, environment_of, on_ranks
from .small_sweeps import until
from .test_resume import CutOff, settings_of
from .test_trainer import Points, Steps, points, regression, squared_error

LOSSES = ("train_loss", "val_loss", "train_loss_running", "val_accuracy", "train_accuracy", "gradient_norm")
ROOT = Path(__file__).parents[1]


def assert_same_curves(found: Path, expected: Path, *, within: float = 1e-5) -> None:
    histories = [read_history(folder) for folder in (found, expected)]
    for name in LOSSES:
        mine, theirs = ([point["value"] for point in history[name]] for history in histories)
        assert mine == pytest.approx(theirs, abs=within), name


# One training, on one rank and on several


def train(ranks: Ranks, settings: ExperimentSettings, name: str, cut_after: int | None, resumes: bool) -> str:
    """Trains in the folder `name`, from its checkpoint if it `resumes`; cut off after so many steps."""
    attempt = ranks.by_first(lambda: attempt_to_resume(name, lambda state: Path(name))) if resumes else None
    listener = CutOff(None, steps=cut_after)
    result = pretrain(
        settings, experiment=name, folder=Path(name), listener=listener, attempt=attempt, force=True, ranks=ranks
    )
    return result.status


@pytest.mark.parametrize(
    ("ranks", "flags", "alone"),
    [
        (2, {"dropout": 0.0, "epochs": 2}, {}),
        # a step's micro-batches draw the same dropout whoever computes them; the last step leaves a rank without any
        (3, {"dropout": 0.1, "epochs": 2, "batch_size": 26, "use_lora": True}, {"accumulation_steps": 3}),
    ],
    ids=["two ranks", "three ranks with dropout"],
)
def test_ranks_give_the_loss_curve_and_the_metrics_of_one(
    workspace: Workspace, tmp_path: Path, ranks: int, flags: dict[str, Any], alone: dict[str, Any]
) -> None:
    lay_store(tmp_path)
    settings, of_one = settings_of(workspace, **flags), settings_of(workspace, **flags, **alone)
    assert on_ranks(tmp_path, ranks, train, settings, "many", None, False) == ["FINISHED"] * ranks
    with chdir(tmp_path):
        pretrain(of_one, experiment="one", folder=Path("one"), force=True)
        pretrain(settings_of(workspace, **flags, seed=1), experiment="other", folder=Path("other"), force=True)
    assert_same_curves(tmp_path / "many", tmp_path / "one")
    with pytest.raises(AssertionError, match="train_loss"):
        assert_same_curves(tmp_path / "other", tmp_path / "one")
    runs = [read_run(tmp_path / name) for name in ("many", "one")]
    for figure in ("best_epoch", "best_val_loss", "best_val_accuracy", "closed_gap"):
        assert runs[0][figure] == pytest.approx(runs[1][figure], abs=1e-5)


def test_a_run_goes_on_with_another_number_of_ranks(workspace: Workspace, tmp_path: Path) -> None:
    """Two ranks, one, two, each cut off inside an epoch: the uninterrupted curve, once, in one run of MLflow."""
    lay_store(tmp_path)
    settings = settings_of(workspace, epochs=4, dropout=0.0, batch_size=16, checkpoint_minutes=1e-4)
    assert on_ranks(tmp_path, 2, train, settings, "cut", 6, False) == ["RuntimeError"] * 2
    with chdir(tmp_path):
        assert read_position("cut") == (2, 1)
        with pytest.raises(RuntimeError, match="cut off"):
            train(Ranks(), settings, "cut", 6, True)
        assert read_position("cut") == (3, 2)
        assert on_ranks(tmp_path, 2, train, settings, "cut", None, True) == ["FINISHED"] * 2
        pretrain(settings, experiment="whole", folder=Path("whole"), force=True)
    assert_same_curves(tmp_path / "cut", tmp_path / "whole")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("cut").experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val_loss")] == [1, 2, 3, 4]


def read_position(name: str) -> tuple[int, int]:
    state = json.loads(Path(name, "checkpoints", "last", "training_state.json").read_text())
    return state["position"]["epoch"], state["position"]["step"]


def test_the_shares_of_the_ranks_are_the_whole_step(prepared: Path) -> None:
    """No patient twice, none left out, with the masks that one rank draws; also where there are fewer than ranks."""
    data = open_prepared(prepared)
    split = data.split("train")

    def batches(**shares: int) -> TrainingBatches:
        return TrainingBatches(
            split, np.arange(34), batch_size=16, max_position=60, row_length=64, vocab_size=len(data.vocabulary),
            seed=3, **shares,
        )  # fmt: skip

    def tokens(steps: list[Any]) -> list[tuple[int, ...]]:
        found = []
        for batch in steps:
            for row, segments in enumerate(batch.segments):
                for patient in range(int(segments.max()) + 1):
                    seen = [getattr(batch, name)[row][segments == patient].tolist() for name in ("codes", "labels")]
                    found.append(tuple(seen[0] + seen[1]))
        return sorted(found)

    whole = list(batches().epoch(2))
    for ranks, accumulation_steps in ((2, 1), (3, 1), (3, 2)):
        shares = [
            list(batches(rank=rank, ranks=ranks, accumulation_steps=accumulation_steps).epoch(2))
            for rank in range(ranks)
        ]
        for step, expected in enumerate(whole):
            found = [tokens(share[step]) for share in shares]
            assert sorted(itertools.chain(*found)) == tokens(expected)
            assert len(expected) == 1
    assert [len(share[-1]) for share in shares] == [1, 1, 0]  # the last step has two patients


# The step


def regress(ranks: Ranks, shares: list[list[Points]], steps: int = 3) -> list[float]:
    """The weights after some steps, of which this rank computes its share."""
    model = regression()
    settings = TrainingSettings(epochs=steps, lr=0.01, early_stopping_patience=0, gradient_clip=0.5)
    trainer = Trainer(
        model, squared_error, steps=Steps([shares[ranks.rank]]), train_evaluation=[points(5, 1), points(2, 3)],
        validation=[points(7, 2)], settings=settings, device=torch.device("cpu"), ranks=ranks,
    )  # fmt: skip
    last = list(trainer.epochs())[-1]
    return [*model.weight.flatten().tolist(), model.bias.item(), last.train_loss, last.gradient_norm]


def test_uneven_shares_and_none_at_all_give_the_step_of_the_whole(tmp_path: Path) -> None:
    whole = points(20, 0)
    uneven = [[Points(whole.inputs[part], whole.targets[part])] for part in (slice(0, 3), slice(3, 20))]
    found = on_ranks(tmp_path, 3, regress, [*uneven, []])
    assert found[0] == found[1] == found[2]
    alone = regress(Ranks(), [[whole]])
    assert found[0] == pytest.approx(alone, rel=1e-5)
    of_a_part = regress(Ranks(), [uneven[1]])
    assert found[0] != pytest.approx(of_a_part, rel=1e-3)


def leaves_out(ranks: Ranks, with_share: int) -> tuple[bool, bool]:
    """Whether decay moves a parameter that no loss depends on, and one that the loss of a single rank depends on."""
    model = nn.ModuleList([regression(), regression()])
    unused, used = (module.weight.detach().clone() for module in model)
    trainer = Trainer(
        model, lambda model, batch: squared_error(model[1], batch),
        steps=Steps([[points(8, 0)] if ranks.rank == with_share else []]), train_evaluation=[points(5, 1)],
        validation=[points(7, 2)], settings=TrainingSettings(epochs=2, weight_decay=0.9), device=torch.device("cpu"),
        ranks=ranks,
    )  # fmt: skip
    list(trainer.epochs())
    return torch.equal(model[0].weight, unused), torch.equal(model[1].weight, used)


def test_what_no_rank_has_reached_is_left_as_it_is(tmp_path: Path) -> None:
    assert on_ranks(tmp_path, 2, leaves_out, 1) == [(True, False)] * 2 == [leaves_out(Ranks(), 0)] * 2


class Halving(Steps):
    """One step of eight items, in as many micro-batches as it is asked for."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__([[]])
        self._rank, self._ranks = rank, ranks

    def epoch(self, epoch: int, first_step: int = 0, *, accumulation_steps: int | None = None) -> Any:
        whole, parts = points(8, 0), min(8, (accumulation_steps or 1) * self._ranks)
        cut = [Points(*pair) for pair in zip(whole.inputs.chunk(parts), whole.targets.chunk(parts), strict=True)]
        yield cut[self._rank :: self._ranks]


def halve(ranks: Ranks, room: list[int]) -> tuple[int, list[float]]:
    """Accumulation steps and weights after two steps on devices with room for so many items."""

    def loss(model: nn.Module, batch: Points) -> Any:
        if model.training and batch.num_scored > room[ranks.rank]:
            raise torch.OutOfMemoryError
        return squared_error(model, batch)

    model = regression()
    trainer = Trainer(
        model, loss, steps=Halving(ranks.rank, ranks.size), train_evaluation=[points(5, 1)], validation=[points(7, 2)],
        settings=TrainingSettings(epochs=2, lr=0.01, batch_size=8), device=torch.device("cpu"), ranks=ranks,
    )  # fmt: skip
    list(trainer.epochs())
    return trainer.accumulation_steps, model.weight.flatten().tolist()


def test_where_one_rank_runs_out_of_memory_all_take_the_step_again_in_smaller_parts(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, 2, halve, [4, 2])
    assert first == second
    assert first[0] == 2
    assert first[1] == pytest.approx(halve(Ranks(), [8])[1], rel=1e-5)
    assert on_ranks(tmp_path, 2, halve, [4, 4])[0][0] == 1


def test_where_one_patient_is_too_much_for_one_rank_all_end(tmp_path: Path) -> None:
    assert on_ranks(tmp_path, 2, halve, [4, 0]) == ["AllOutOfMemory"] * 2


def short_of_memory(*words: str) -> int:
    """A behrt command on whose second rank not even one patient fits."""
    rank = Ranks.of_environment().rank

    def loss(model: nn.Module, batch: Any) -> Any:
        if rank == 1 and model.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return masked_lm_loss(model, batch)

    pretrain_module.masked_lm_loss = loss  # type: ignore[assignment]
    return command(*words)


def test_a_run_that_memory_ends_on_one_rank_is_lost_on_all_and_says_what_helps(prepared: Path, tmp_path: Path) -> None:
    lay_store(tmp_path)
    flags = ["--data", str(prepared), "--max-patients", "40", "--batch-size", "4", "--out", "run", "--force"]
    ranks = ForkedRanks(tmp_path, 2, short_of_memory, "train", *flags)
    assert ranks.answers() == [4, 4]
    first, second = ranks.said()
    assert "memory does not suffice" in first
    assert second == ""
    assert read_run(tmp_path / "run")["lost_to"] == "out_of_memory"


def runs_out_alone(ranks: Ranks) -> None:
    if ranks.is_first:
        raise torch.OutOfMemoryError("CUDA out of memory")
    ranks.sums(1.0)


def test_a_rank_that_runs_out_of_memory_by_itself_is_not_waited_for(tmp_path: Path) -> None:
    assert on_ranks(tmp_path, 2, runs_out_alone) == ["RankError", "RankLost"]
    assert "rank 0: the device has no memory left" in (tmp_path / "said-0.txt").read_text()
    assert "another process of the run has ended (" in (tmp_path / "said-1.txt").read_text()


def traffic(ranks: Ranks, prepared: Path, use_lora: bool) -> tuple[int, int]:
    """Bytes that a step sums over the ranks, and how many parameters are trained."""
    data = open_prepared(prepared)
    model = BEHRTForMaskedLM(BEHRTConfig.small(vocab_size=len(data.vocabulary), max_position=60))
    if use_lora:
        apply_lora_to_behrt(model, rank=4, train_embeddings=False)
    steps = TrainingBatches(
        data.split("train"), np.arange(16), batch_size=8, max_position=60, row_length=64,
        vocab_size=len(data.vocabulary), seed=0, rank=ranks.rank, ranks=ranks.size,
    )  # fmt: skip
    evaluated = next(steps.epoch(9))
    trainer = Trainer(
        model, masked_lm_loss, steps=steps, train_evaluation=evaluated, validation=evaluated,
        settings=TrainingSettings(epochs=1), device=torch.device("cpu"), ranks=ranks,
    )  # fmt: skip
    list(trainer.epochs())
    return ranks.bytes_summed // 2, int(count_parameters(model)["trainable"])


def test_only_gradients_of_what_is_trained_travel(tmp_path: Path, prepared: Path) -> None:
    full, lora = (on_ranks(tmp_path, 2, traffic, prepared, use_lora) for use_lora in (False, True))
    for (travelled, trained), *others in (full, lora):
        assert travelled == 4 * (trained + 1)  # and the loss
        assert others == [(travelled, trained)]
    assert lora[0][0] < full[0][0] / 4


def drift(ranks: Ranks, ulps: int) -> int:
    """Epochs that are trained where a weight of the second rank is moved by so little after the second step."""
    model = regression()

    def move(step: int, steps: int) -> None:
        for _ in range(ulps if step == 2 and ranks.rank == 1 else 0):
            model.weight.data[0, 0] = torch.nextafter(model.weight.data[0, 0], torch.tensor(math.inf))

    trainer = Trainer(
        model, squared_error, steps=Steps([[points(4, ranks.rank)]] * 2), train_evaluation=[points(5, 1)],
        validation=[points(7, 2)], settings=TrainingSettings(epochs=2), device=torch.device("cpu"), on_step=move,
        ranks=ranks,
    )  # fmt: skip
    return len(list(trainer.epochs()))


def test_weights_that_differ_in_one_bit_end_the_run(tmp_path: Path) -> None:
    assert on_ranks(tmp_path, 2, drift, 0) == [2, 2]
    assert on_ranks(tmp_path, 2, drift, 1) == ["RanksDiffer"] * 2
    assert "epoch 1: the ranks no longer hold the same weights" in (tmp_path / "said-0.txt").read_text()


# Ends


def fails_on(ranks: Ranks, failing: int, kind: str) -> str:
    with ranks.together():
        if ranks.rank == failing:
            raise UserError("no such thing") if kind == "mistake" else RuntimeError("a bug")
    return "went on"


def test_what_fails_on_one_rank_ends_all_and_is_said_by_that_one(tmp_path: Path) -> None:
    assert on_ranks(tmp_path, 2, fails_on, 0, "mistake") == ["UserError", "EndedElsewhere: another rank ends with 2"]
    assert on_ranks(tmp_path, 2, fails_on, 1, "mistake") == ["EndedElsewhere: another rank ends with 2", "RankError"]
    assert on_ranks(tmp_path, 2, fails_on, 1, "bug") == ["EndedElsewhere: another rank ends with 1", "RuntimeError"]
    assert on_ranks(tmp_path, 2, fails_on, 7, "mistake") == ["went on"] * 2
    assert "rank 1: no such thing" in (tmp_path / "said-1.txt").read_text()


@pytest.mark.parametrize("said", ["NCCL error: unhandled system error\nLast error: shared memory", "Connection closed"])
def test_what_the_library_says_of_a_rank_that_is_lost_is_passed_on(said: str) -> None:
    ranks = Ranks(0, 2)
    with pytest.raises(RankLost, match=said.partition("\n")[0]), ranks._guarded():
        raise RuntimeError(said)


# On GPUs that are not here


def test_every_rank_takes_a_card_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for rank in (0, 1):
        assert Ranks(rank, 2, local_rank=rank).take_device(torch.device("cuda")) == torch.device("cuda", rank)
    assert taken == [0, 1]
    assert Ranks(2, 4, local_rank=0).take_device(torch.device("cuda")).index == 0  # the first of another machine


@pytest.mark.parametrize(
    ("rank", "device", "said"), [(2, "cuda", "there are 2 [(]cuda[)]; start 2"), (0, "mps", "there is 1 [(]mps[)]")]
)
def test_more_ranks_than_cards_are_refused(monkeypatch: pytest.MonkeyPatch, rank: int, device: str, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=f"every process needs a GPU of its own, and {said}"):
        Ranks(rank, 3, local_rank=rank).take_device(torch.device(device))


def test_tensors_of_a_card_are_summed_by_nccl_and_what_is_agreed_on_by_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[object] = []
    monkeypatch.setattr("torch.distributed.new_group", lambda backend: f"group of {backend}")
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, group: groups.append(group))
    monkeypatch.setattr("behrt.ranks.free_cached_memory", lambda device: None)
    ranks = Ranks(0, 2)
    ranks.connect(torch.device("cuda", 0))
    ranks.all_sum(SimpleNamespace(device=torch.device("cuda", 0), nbytes=4))  # type: ignore[arg-type]
    ranks.all_sum(torch.zeros(1))
    assert groups == ["group of nccl", None]


def dies(ranks: Ranks) -> None:
    ranks.sums(1.0)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.sums(1.0)


def test_a_rank_that_is_killed_is_noticed_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    assert on_ranks(tmp_path, 2, dies) == ["RankLost", None]
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--lr", "-1"], 2, "lr"),
        (["--vocab-size", "9"], 2, "--vocab-size: 9 cannot hold"),
        (["--resume", "nowhere"], 2, "--resume: nowhere: no such folder"),
        (["--resume", "{full}", "--lr", "-1"], 2, "--lr: input should be greater than 0"),
        (["--use-lora", "--no-train-embeddings", "--no-train-head", "--lr", "100"], 3, "refused"),
    ],
    ids=["a flag", "a setting", "no run", "a flag of a run that goes on", "the pre-flight"],
)
def test_a_mistake_is_said_once_and_ends_all_ranks(
    workspace: Workspace, tmp_path: Path, words: list[str], code: int, line: str
) -> None:
    lay_store(tmp_path)
    data = [] if "--resume" in words else ["--data", str(workspace.prepared)]
    ranks = ForkedRanks(tmp_path, 2, command, "train", *data, *(word.format(full=workspace.full) for word in words))
    assert ranks.answers() == [code, code]
    first, second = ranks.said()
    assert line in first
    assert second == ""


@pytest.mark.parametrize("words", [["sweep", "run", "a.yaml"], ["finetune", "--task", "a"], ["doctor", "a"]])
def test_other_commands_refuse_to_be_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str]
) -> None:
    for rank, said in ((0, f"torchrun: several processes share a behrt train, not a behrt {words[0]}"), (1, "")):
        with monkeypatch.context() as patch:
            patch.setattr("behrt.cli.SECONDS_TO_SPEAK", 0.0)
            for name, value in environment_of(rank, 2, 1).items():
                patch.setenv(name, value)
            assert main(words) == 2
        assert said in capsys.readouterr().err


def signalled(*words: str) -> int:
    """A behrt command whose second rank gets a SIGTERM after its fourteenth step."""
    taken = itertools.count(1)

    def step(listener: Listener, number: int, steps: int) -> None:
        if next(taken) == 14:
            os.kill(os.getpid(), signal.SIGTERM)

    Listener.step = step  # type: ignore[method-assign]
    return command(*words)


def test_a_signal_to_one_rank_ends_all_at_the_same_step_and_nothing_is_lost(
    workspace: Workspace, tmp_path: Path
) -> None:
    lay_store(tmp_path)
    flags = ["--data", str(workspace.prepared), "--max-patients", "80", "--epochs", "4", "--batch-size", "8"]
    flags += ["--dropout", "0", "--force"]
    ranks = ForkedRanks(tmp_path, 2, signalled, "train", *flags, "--out", "cut")
    assert ranks.answers() == [143, 143]
    first, second = ranks.said()
    assert "To go on: behrt train --resume cut" in first
    assert "behrt: stopped by SIGTERM" in first
    assert second.strip() == ""
    assert (read_run(tmp_path / "cut")["status"], read_run(tmp_path / "cut")["stopped"]) == ("KILLED", True)
    with chdir(tmp_path):
        assert read_position("cut") == (2, 5)  # the step after that, in which all are told
        assert main(["train", "--resume", "cut", "--force"]) == 0
        assert main(["train", *flags, "--out", "whole"]) == 0
    assert_same_curves(tmp_path / "cut", tmp_path / "whole")


def test_a_restart_goes_on_with_the_run_that_the_same_torchrun_began(workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(workspace.full, tmp_path / "run")
    record = TrackingRecord.load(tmp_path / "run")
    for tags, restarts, is_found in (
        ({}, 1, False),
        ({LAUNCH: "another"}, 1, False),
        ({LAUNCH: "this"}, 0, False),
        ({LAUNCH: "this"}, 1, True),
    ):
        replace(record, tags={**record.tags, **tags}, status="RUNNING").save(tmp_path / "run")
        found = run_before_restart(tmp_path / "run", Ranks(restarts=restarts, launch="this"))
        assert (found is not None) == is_found


def test_a_restart_trains_no_run_on_that_was_ended_for_a_reason() -> None:
    run = {"status": "KILLED", "stopped": False, "refused": False, "lost_to": None}
    assert not has_ended(run)  # a rank was lost
    assert not has_ended({**run, "status": "RUNNING"})
    assert has_ended({**run, "status": "FINISHED"})
    ended: tuple[tuple[dict[str, Any], type[BaseException]], ...] = (
        ({"stopped": True}, Terminated),
        ({"refused": True, "status": "FAILED"}, RefusedRun),
        ({"lost_to": "not_finite", "status": "FAILED"}, LostRun),
    )
    for changes, error in ended:
        with pytest.raises(error):
            has_ended({**run, **changes})


# torchrun itself


NOTES_ITS_END = """
import atexit, runpy, sys
atexit.register(print, "the interpreter ends")
sys.argv = ["behrt", "--version"]
runpy.run_module("behrt", run_name="__main__")
"""


@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_ends_with_its_last_word_and_not_with_the_interpreters_own_end(size: int) -> None:
    """In which a thread of a process group may abort it: seen once in some twenty trainings."""
    environment = {**os.environ, **environment_of(0, size, 1), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", NOTES_ITS_END], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("behrt")
    assert ("the interpreter ends" in done.stdout) == (size == 1)


def torchrun(folder: Path, *words: str, restarts: int) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    return subprocess.Popen(
        [sys.executable, *starter, "-m", "behrt", "train", *words],
        cwd=folder, env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True, stderr=subprocess.PIPE,
    )  # fmt: skip


def ranks_below(agent: int) -> list[int]:
    """The processes that torchrun has started, in their order."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return sorted(int(child) for child in children)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [1, 0])
def test_a_killed_rank_is_started_again_and_the_run_goes_on(
    workspace: Workspace, tmp_path: Path, restarts: int
) -> None:
    lay_store(tmp_path)
    flags = ["--data", str(workspace.prepared), "--epochs", "6", "--dropout", "0", "--batch-size", "4"]
    flags += ["--precision", "fp32"]
    started = torchrun(tmp_path, *flags, "--out", "run", restarts=restarts)
    history = tmp_path / "run" / "logs" / "metrics_history.json"
    until(lambda: history.exists() and len(json.loads(history.read_text())["val_loss"]) >= 2)
    os.kill(ranks_below(started.pid)[1], signal.SIGKILL)
    try:
        said = started.communicate(timeout=120)[1]
    finally:
        started.kill()
    if not restarts:
        assert started.returncode != 0
        assert read_run(tmp_path / "run")["status"] == "KILLED"
        return
    assert started.returncode == 0, said
    assert read_run(tmp_path / "run")["status"] == "FINISHED"
    assert not (tmp_path / "run" / "earlier").exists()
    with chdir(tmp_path):
        assert main(["train", *flags, "--out", "whole"]) == 0
    assert_same_curves(tmp_path / "run", tmp_path / "whole")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val_loss")] == [1, 2, 3, 4, 5, 6]
