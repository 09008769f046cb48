"""AdamBNN's optimiser: two parameter groups, a learning rate per epoch (2106.11309); and SGD."""

import logging

import torch
from torch import nn

from tritonbnn.nn import decayed_parameters

logger = logging.getLogger(__name__)

_FUSED_DEVICES = ("cpu", "cuda")
_FEW_EPOCHS = 3


def learning_rate(lr: float, epoch: int, epochs: int) -> float:
    """The learning rate of ``epoch``, counted from 0: lr * (1 - (epoch + 1) / epochs).

    The published code steps its schedule before the first batch. So no epoch runs at ``lr``, and in
    the last one no weight moves: it refreshes the running statistics of BatchNorm.
    """
    return lr * (1 - (epoch + 1) / epochs)


def build_optimizer(
    name: str, model: nn.Module, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Adam (0.9, 0.999, eps 1e-8) or SGD (momentum 0.9), with L2 for the decayed group only.

    The L2 term is added to the gradient.

    Args:
        name: "adam" or "sgd".
        model: already on its device.
        lr: learning rate.
        weight_decay: for convolution weights and learnable shifts.
    """
    chosen = {id(p) for p in decayed_parameters(model)}
    decayed = [p for p in model.parameters() if id(p) in chosen]
    others = [p for p in model.parameters() if id(p) not in chosen]
    fused = all(p.device.type in _FUSED_DEVICES for p in model.parameters())
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=fused)
    return torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """Tensors and scalars of each group, as one line."""
    parts = []
    for group in optimizer.param_groups:
        tensors, scalars = len(group["params"]), sum(p.numel() for p in group["params"])
        parts.append(f"{tensors} tensors / {scalars:,} scalars at L2 {group['weight_decay']:g}")
    return f"{type(optimizer).__name__}: " + ", ".join(parts)


def warn_of_few_epochs(step: int, epochs: int) -> None:
    """The schedule's last epoch is at learning rate 0, which short runs notice."""
    if epochs < _FEW_EPOCHS:
        logger.warning(
            "step %d has %d epoch%s, and no weight moves in the last one (its learning rate is 0,"
            " as published): give it at least %d",
            step,
            epochs,
            "" if epochs == 1 else "s",
            _FEW_EPOCHS,
        )
