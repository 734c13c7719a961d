"""Does a run compute where it was asked to, in a precision that the hardware has?"""

import pytest
import torch

from behrt.config import UserError
from behrt.devices import choose_device, choose_precision


def test_auto_prefers_cuda_then_mps_then_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert choose_device("auto").type == expected


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device: cuda .* not available here; use one of: cpu, auto"):
        choose_device("cuda")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize(("amx", "avx512"), [(True, False), (False, True), (False, False)])
def test_auto_uses_bf16_on_a_cpu_only_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert choose_precision("auto", torch.device("cpu")) is (torch.bfloat16 if amx or avx512 else torch.float32)


def test_mps_stays_on_float32() -> None:
    assert choose_precision("auto", torch.device("mps")) is torch.float32
    with pytest.raises(UserError, match="--precision"):
        choose_precision("bf16", torch.device("mps"))
