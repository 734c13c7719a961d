"""Does a GPU compute what the CPU does? Needs a CUDA card; elsewhere nothing of this runs."""

import pytest
import torch

from behrt import model as model_module
from behrt.attention import runs_can_stay
from behrt.config import load_experiment
from behrt.model import compile_layers
from behrt.pretrain import build_model, masked_lm_loss
from behrt.records import open_records, select_records

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
CUDA = torch.device("cuda")


def loss_and_gradients(adaptation: str, *, runs: bool, compiled: bool, precision: torch.dtype, monkeypatch):
    """Of one batch of the simulated cohort, for a large model without dropout."""
    flags = {"model_size": "large", "dropout": 0.0, "num_patients": 500, "use_lora": adaptation == "lora"}
    settings = load_experiment(flags=flags)
    records = select_records(open_records(settings.data), settings)
    model, _, _ = build_model(settings, records)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora.B"):  # else the adapters' A has no gradient
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draws))
    model.to(CUDA).train()
    if compiled:
        compile_layers(model)
    if not runs:
        monkeypatch.setattr(model_module, "runs_can_stay", lambda device, head_dim: False)
    batch = records.validation.packed(64, records.row_length)[0]
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
        if runs:
            assert runs_can_stay(CUDA, 64)
        loss = masked_lm_loss(model, batch.to(CUDA)).loss / batch.num_scored
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("adaptation", ["lora", "full"])
@pytest.mark.parametrize(
    ("runs", "compiled"), [(False, False), (True, False), (True, True)], ids=["padded", "end to end", "compiled"]
)
def test_bf16_on_the_card_is_close_to_fp32(
    adaptation: str, runs: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, exact_gradients = loss_and_gradients(
        adaptation, runs=False, compiled=False, precision=torch.float32, monkeypatch=monkeypatch
    )
    monkeypatch.undo()
    loss, gradients = loss_and_gradients(
        adaptation, runs=runs, compiled=compiled, precision=torch.bfloat16, monkeypatch=monkeypatch
    )
    assert loss == pytest.approx(exact, rel=2e-3)
    assert torch.cosine_similarity(gradients, exact_gradients, dim=0) > 0.995
