"""torch's AdamW, started without a compiler.

To keep a compiler out of their methods torch's optimizers import torch._dynamo, which takes as long as torch itself. Nothing
compiles an optimizer here, so each method stands for what torch._dynamo would make of it. Muon gains by it, too.
"""

import inspect

import torch

for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
    method = inspect.unwrap(getattr(torch.optim.Optimizer, name))
    setattr(method, "__dynamo_disable", method)


class AdamW(torch.optim.AdamW):
    """Decoupled weight decay (arXiv 1711.05101)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
