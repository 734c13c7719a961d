"""Is the optimizer torch's own AdamW in all but the time that it takes to make?"""

import subprocess
import sys

import torch
from torch import nn

from behrt.optimizer import AdamW


def trained(kind: type[torch.optim.AdamW]) -> tuple[nn.Module, torch.optim.AdamW]:
    """A layer after some steps, the optimizer's state put away and taken out again in between."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = kind(groups, lr=0.01, fused=True)
    for _ in range(4):
        optimizer.load_state_dict(optimizer.state_dict())
        layer(torch.randn(8, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer, optimizer


def test_its_steps_and_its_state_are_those_of_torch_to_the_last_bit() -> None:
    (layer, optimizer), (reference, theirs) = trained(AdamW), trained(torch.optim.AdamW)
    assert torch.equal(layer.weight, reference.weight)
    assert torch.equal(layer.bias, reference.bias)
    ours, expected = optimizer.state_dict(), theirs.state_dict()
    assert ours["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(ours["state"], expected["state"], rtol=0, atol=0)


def test_steps_import_nothing_of_the_compiler() -> None:
    code = (
        "import sys; from tests.test_optimizer import AdamW, trained; trained(AdamW); "
        "print({'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout == b"set()\n"
