"""Which parameters an optimiser treats alike: by the kind of their module, never by name."""

from torch import Tensor, nn
from torch.optim import Optimizer

from tritonbnn.nn import binary_weights, decayed_parameters

GROUPS = ("binary", "decayed", "rest")


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """All parameters of a network, each in one group.

    ``binary`` holds the weights that are binarised, or will be in a later stage. ``decayed`` holds
    the other convolution weights and the learnable shifts, which AdamBNN decays too (2106.11309).
    ``rest`` holds what is never decayed: BatchNorm, slopes, biases, the head.
    """
    binary = {id(weight) for weight in binary_weights(model).values()}
    decayed = {id(parameter) for parameter in decayed_parameters(model)} - binary
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for parameter in model.parameters():
        name = "binary" if id(parameter) in binary else "rest"
        groups["decayed" if id(parameter) in decayed else name].append(parameter)
    return groups


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give each group the learning rate, times its ``lr_factor`` where it has one."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # stays where it is, as a captured step reads it there
        else:
            group["lr"] = rate


def describe_groups(optimizer: Optimizer) -> str:
    """Tensors and scalars of each group, as one line."""
    parts = []
    for group in optimizer.param_groups:
        tensors, scalars = len(group["params"]), sum(p.numel() for p in group["params"])
        part = f"{tensors} {group['name']} tensors / {scalars:,} scalars"
        if "weight_decay" in group:
            part += f" at L2 {group['weight_decay']:g}"
        parts.append(part)
    return f"{type(optimizer).__name__}: " + ", ".join(parts)
