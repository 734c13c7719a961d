"""Would a training run on the GPU of a Mac, as far as that can be told without one?

A step is computed on torch's `meta` device, which takes the same way through the model as any device but the CPU. Every
operator that is called there is looked up in the list from which torch itself is built: does it have a kernel for MPS?
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from torch import nn
from torch.optim.optimizer import _get_fused_kernels_supported_devices
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from behrt.batches import TrainingBatches
from behrt.config import BEHRTConfig
from behrt.devices import choose_precision
from behrt.model import BEHRTForMaskedLM
from behrt.parameters import apply_lora_to_behrt
from behrt.pretrain import masked_lm_loss
from behrt.sequences import open_prepared

ON_ANY_DEVICE = {"CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd"}
META = torch.device("meta")


@cache
def operators() -> dict[str, dict[str, Any]]:
    """Torch's own list, by name and overload."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    return {entry["func"].partition("(")[0]: entry for entry in yaml.load(path.read_text(), yaml.CSafeLoader)}


def has_mps_kernel(name: str) -> bool:
    """Whether an operator runs on MPS, by a kernel of its own or made of operators that do.

    Names are as in torch's list: `add.Tensor`.
    """
    entry = operators()[name]
    if delegate := entry.get("structured_delegate"):
        return has_mps_kernel(delegate)
    kinds = {
        kind.strip() for kinds in entry.get("dispatch", {"CompositeImplicitAutograd": ""}) for kind in kinds.split(",")
    }
    return bool(kinds & ({"MPS"} | ON_ANY_DEVICE))


class Called(TorchDispatchMode):
    """Notes which operators make tensors on the device, and of which dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device == META]
        if on_device:
            self.names.add(func.name().removeprefix("aten::"))
            self.dtypes |= {tensor.dtype for tensor in on_device}
        return made


@pytest.fixture(scope="module")
def step(prepared: Path) -> Sequence[Any]:
    data = open_prepared(prepared)
    training = data.split("train")
    batches = TrainingBatches(
        training, range(len(training)), batch_size=16, max_position=64, row_length=128,
        vocab_size=len(data.vocabulary), seed=0,
    )  # fmt: skip
    return next(batches.epoch(1))


@pytest.fixture(autouse=True)
def _autocast_as_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast, which knows no `meta`, is asked about MPS."""

    def on_mps(device: str) -> str:
        return "mps" if device == "meta" else device

    is_enabled, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: is_enabled(on_mps(device)))
    monkeypatch.setattr(torch, "autocast", lambda device, **how: autocast(on_mps(device), **how))


@contextmanager
def called_in_a_step(step: Sequence[Any], *, use_lora: bool) -> Iterator[Called]:
    """What a step of training and one of evaluation call on the device."""
    model = BEHRTForMaskedLM(BEHRTConfig.small(vocab_size=400, max_position=64))
    if use_lora:
        apply_lora_to_behrt(model, dropout=0.1)
    model.to(META)
    with Called() as called:
        for batch in step:
            loss = masked_lm_loss(model.train(), batch.to(META)).loss
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            masked_lm_loss(model.eval(), step[0].to(META))
    yield called


@pytest.mark.parametrize("use_lora", [False, True])
def test_every_operator_of_a_step_has_a_kernel_for_mps(step: Sequence[Any], use_lora: bool) -> None:
    with called_in_a_step(step, use_lora=use_lora) as called:
        assert {"embedding_dense_backward", "mm"} <= called.names, "the step was computed on the device"
        assert [name for name in sorted(called.names) if not has_mps_kernel(name)] == []


def test_the_update_of_the_weights_has_a_kernel_for_mps() -> None:
    assert "mps" in _get_fused_kernels_supported_devices()
    assert has_mps_kernel("_fused_adamw_")


def test_an_operator_that_mps_lacks_is_found() -> None:
    assert not has_mps_kernel("_linalg_eigh")
    assert has_mps_kernel("mm")


def test_nothing_on_the_device_is_of_a_type_that_mps_lacks(step: Sequence[Any]) -> None:
    with called_in_a_step(step, use_lora=False) as called:
        assert called.dtypes <= {torch.float32, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool}
    with Called() as called:
        torch.zeros(2, device=META).double()
    assert torch.float64 in called.dtypes


def test_a_mac_computes_in_float32() -> None:
    """In float16 gradients underflow without a scaled loss; bf16 is emulated on an M1."""
    assert choose_precision("auto", torch.device("mps")) is torch.float32
