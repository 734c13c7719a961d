"""Which optimizer updates the weights, and what does it cost to make one?

torch's own AdamW (Loshchilov & Hutter, 2019), less what its methods are wrapped in so that they can stand inside
`torch.compile`: the first call of any of these wrappers imports `torch._dynamo` and sympy, which takes a second and
70 MB of every process that trains. The updates are the same to the last bit. Should torch wrap them in another way one
day, nothing is unwrapped, and only that second is lost.
"""

from __future__ import annotations

import inspect

import torch


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, for a step that is not compiled."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
