"""Does `behrt devices` show what is there, and what a run would really use of it?"""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from behrt.cli import main
from behrt.devices import choose_device, choose_precision
from behrt.hardware import absent, cpu_model, devices_here, memory_of

GIB = 2**30


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * GIB, 48 * GIB))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr("behrt.hardware.runs_can_stay", lambda device, head_dim: True)


def test_the_first_device_is_the_one_that_a_run_takes_in_the_precision_that_it_takes() -> None:
    first = devices_here()[0]
    assert first.is_chosen
    assert torch.device(first.device).type == choose_device("auto").type
    precision = choose_precision("auto", choose_device("auto"))
    assert first.precision == ("bf16" if precision is torch.bfloat16 else "fp32")


@pytest.mark.usefixtures("two_cards")
def test_of_two_cards_a_run_takes_the_first_and_the_user_is_told_how_to_take_both(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = devices_here()
    assert [(device.device, device.is_chosen) for device in found] == [
        ("cuda:0", True), ("cuda:1", False), ("cpu", False)
    ]  # fmt: skip
    assert (found[1].name, found[1].memory_free, found[1].compiles) == ("Card 1", 40 * GIB, True)
    assert main(["devices"]) == 0
    said = capsys.readouterr().err
    assert "A run uses cuda:0, in bf16" in said
    assert "All 2 cards: torchrun --nproc-per-node 2 -m behrt train" in said


@pytest.mark.usefixtures("two_cards")
def test_a_card_that_is_full_is_shown_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(device: torch.device) -> tuple[int, int]:
        if device.index == 1:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
        return 40 * GIB, 48 * GIB

    def kernel(device: torch.device, head_dim: int) -> bool:
        memory(device)
        return True

    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr("behrt.hardware.runs_can_stay", kernel)
    first, second, _ = devices_here()
    assert (first.memory_free, first.attention) == (40 * GIB, "patients end to end")
    assert (second.memory_free, second.attention) == (None, "not to be tried now: CUDA error: out of memory")


def test_a_mac_is_shown_with_what_its_gpu_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10 * GIB)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 1 * GIB)
    first = devices_here()[0]
    assert (first.device, first.precision, first.memory_free) == ("mps", "fp32", 9 * GIB)
    assert "mps" not in absent()


def test_a_limit_of_the_container_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("behrt.hardware.free_memory", lambda: 8 * GIB)
    for room, expected in ((2 * GIB, 2 * GIB), (None, 8 * GIB)):
        monkeypatch.setattr("behrt.hardware.control_group_room", lambda room=room: room)
        assert memory_of(torch.device("cpu"))[1] == expected


def test_a_kernel_that_names_no_processor_is_no_error(tmp_path: Path) -> None:
    assert cpu_model(tmp_path / "none")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"


def test_json_has_the_devices_and_why_others_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"][0]["is_chosen"]
    shown = {device["device"].partition(":")[0] for device in found["devices"]}
    assert shown | set(found["absent"]) == {"cpu", "cuda", "mps"}
