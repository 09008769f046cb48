"""Optimisers whose step a CUDA graph can repeat: nothing that changes is a number on the host."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from tritonbnn.optim.optimizers import Adam, AdamW

CAPTURABLE = (Adam, AdamW)
"""The settings of optimisers that :func:`make_capturable` takes. They are fused on a GPU."""


def make_capturable(optimizer: Optimizer) -> None:
    """Have a fused Adam keep its learning rates in tensors, which its step reads on the device.

    :func:`~tritonbnn.optim.set_learning_rate` then writes these, and the step is the same whether
    it is captured or not. A checkpoint may have brought a rate as a tensor on the host.

    Args:
        optimizer: an Adam or AdamW of torch, with its state as it will go on.
    """
    for group in optimizer.param_groups:
        device = group["params"][0].device
        rate = group["lr"]
        number = rate.item() if isinstance(rate, Tensor) else rate
        group["lr"] = torch.tensor(number, dtype=torch.float32, device=device)
        group["capturable"] = True
