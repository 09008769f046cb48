"""Which parameters of a network are what, decided by module type."""

from collections.abc import Iterator

from torch import nn

from tritonbnn.nn.activations import RPReLU, RSign
from tritonbnn.nn.layers import BinaryConv2d, BinaryLinear
from tritonbnn.nn.unit import BinaryUnit

_SHIFTS = {
    RSign: ("shift",),
    RPReLU: ("shift_in", "shift_out"),
    BinaryConv2d: ("shift",),
    BinaryLinear: ("shift",),
    BinaryUnit: ("shift_in", "shift_mid", "shift_out"),
}


def decayed_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that AdamBNN decays (2106.11309, methods 1.5).

    They are all convolution weights, and all learnable shifts: the published code decays what has
    four dimensions, and there a shift has shape (1, C, 1, 1).
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 4:
            yield weight
        for kind, names in _SHIFTS.items():
            if isinstance(module, kind):
                shifts = (getattr(module, name) for name in names)
                yield from (shift for shift in shifts if shift is not None)


def binary_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are binarised in step 2, by their name in the state dict."""
    kinds = (BinaryConv2d, BinaryLinear, BinaryUnit)
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }
